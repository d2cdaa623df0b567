"""RQ's commands to a worker (stop a job, shut down), received by asyncio instead of a thread."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping

import redis.asyncio as aredis

from queue_api.connection.failures import REDIS_ERRORS, is_passing

__all__ = ["listen_for_commands"]

logger = logging.getLogger(__name__)

POLL_S = 10.0
RETRY_S = 1.0


async def listen_for_commands(
    connection: aredis.Redis,
    channel: str,
    obey: Callable[[str, Mapping[str, object]], None],
    listening: asyncio.Event,
) -> None:
    """Call `obey(command, arguments)` for each command, until cancelled.

    `listening` is set once commands are heard.

    Publishing isn't queueing: what is sent while the connection is down is lost, as in RQ.
    """
    while True:
        try:
            async with connection.pubsub() as pubsub:
                await pubsub.subscribe(channel)
                await pubsub.get_message(timeout=POLL_S)  # that it is subscribed
                listening.set()
                while True:
                    message = await pubsub.get_message(
                        ignore_subscribe_messages=True, timeout=POLL_S
                    )
                    if message is not None:
                        _dispatch(message["data"], obey)
        except REDIS_ERRORS as error:
            if not is_passing(error):
                raise
            logger.debug("can't hear commands: %s", error)
            await asyncio.sleep(RETRY_S)


def _dispatch(data: bytes, obey: Callable[[str, Mapping[str, object]], None]) -> None:
    try:
        payload = json.loads(data)
        command = payload["command"]
    except (ValueError, TypeError, KeyError, RecursionError):
        logger.warning("ignored a command that can't be read: %.200r", data)
        return
    obey(str(command), payload)
