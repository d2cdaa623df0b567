FROM python:3.12-slim

# Empty: torch as the package index has it (with CUDA on Linux). For a small image without CUDA,
# give the address of PyTorch's CPU wheels, which pytorch.org's "Get started" page shows.
ARG TORCH_INDEX_URL=""
ARG TORCH_VERSION=2.13.0

# gcc: the engine compiles its C sources for the CPU it finds itself on.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 batchmill \
    && mkdir -p /home/batchmill/.cache/huggingface \
    && chown -R batchmill /home/batchmill/.cache
WORKDIR /app

# torch changes seldom and is large: a layer of its own, before the sources.
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==${TORCH_VERSION}"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY queue_api queue_api
COPY engine engine
COPY workers workers
COPY batchmill batchmill
RUN pip install --no-cache-dir -c constraints.txt ".[worker]" "jsonschema>=4.23" \
    # structured output, without the triton that it asks for and CPUs don't use
    && pip install --no-cache-dir -c constraints.txt --no-deps xgrammar apache-tvm-ffi

USER batchmill
ENV PYTHONUNBUFFERED=1
CMD ["batchmill", "worker"]
