"""What an engine has done so far, in tokens."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineMetrics"]


@dataclass(slots=True)
class EngineMetrics:
    """Counts since the engine was loaded."""

    prompt_tokens: int = 0
    """Of the sequences admitted. The new tokens that a sequence was resumed with count among them,
    and so do all its tokens when it is admitted again after a preemption."""
    cached_prompt_tokens: int = 0
    """Those of them that were copied from another sequence's cache instead of computed."""
    computed_tokens: int = 0
    """Tokens that went through the model, prompts' and new ones."""
    preemptions: int = 0
    """Times that a sequence was preempted: gave its slots back, to be recomputed later."""
    moved_tokens: int = 0
    """Tokens whose K and V were copied because their sequence needed a longer range of slots."""

    def __str__(self) -> str:
        return (
            f"{self.prompt_tokens} prompt tokens, {self.prefix_hit_rate:.1%} of them from the "
            f"prefix cache ({self.cached_prompt_tokens}); {self.computed_tokens} tokens computed, "
            f"{self.moved_tokens} moved; {self.preemptions} preemptions"
        )

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens that came from the cache; 0 before the first."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
