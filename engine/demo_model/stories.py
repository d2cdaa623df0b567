"""Makes short stories asked for by two or three words: an animal, a thing, a place."""

from random import Random

from engine.demo_model.words import ANIMALS, NAMES, PLACES, THINGS

STORY_TASK = "story"

_ASKS = (
    "Write a short story with the words {}.",
    "Tell me a story with {}.",
    "Please write a story that uses {}.",
)
_OPENINGS = (
    "One morning a {adjective} {animal} went to the {place}.",
    "Once upon a time there was a {adjective} {animal} who lived near the {place}.",
    "There was a {animal} named {name}. Every day {name} walked to the {place}.",
    "Long ago, a {adjective} {animal} came to the {place} with a friend named {name}.",
)
_FINDS = (
    "There the {animal} found a {thing} in the grass.",
    "Near the {place} lay an old {thing}.",
    "The {animal} wanted a {thing} more than anything else.",
    "Then {name} gave the {animal} a {thing}.",
)
_MIDDLES = (
    "It began to rain, and the {animal} was cold.",
    "The sun was warm and the wind was soft.",
    "The {animal} asked {name} for help, and {name} said yes.",
    "Nobody knew what the {thing} was for.",
    "The {animal} carried the {thing} all the way home.",
    "At night the {thing} began to shine.",
    "They looked at the {thing} for a long time.",
    "The way to the {place} was long, but they did not stop.",
    "Then the {thing} fell into a hole, and the {animal} was sad.",
    "{name} laughed and danced around the {animal}.",
)
_ENDINGS = (
    "In the end they were all happy.",
    "From that day on, the {animal} and {name} were good friends.",
    "And the {animal} never forgot the {place}.",
    "Then the {animal} went home and slept well.",
    "The {thing} is still at the {place} today.",
)
_ADJECTIVES = ("little", "brave", "clever", "tired", "young", "hungry", "happy", "lonely")


def listed(words: list[str]) -> str:
    """Words as a sentence lists them: `fox and lamp`, `fox, lamp and river`."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


def draw_story(rng: Random) -> tuple[str, str, str]:
    """Key (the words asked for), prompt and one story that uses them, 40 to 120 tokens long."""
    fill = {
        "animal": rng.choice(ANIMALS),
        "thing": rng.choice(THINGS),
        "place": rng.choice(PLACES),
        "name": rng.choice(NAMES),
        "adjective": rng.choice(_ADJECTIVES),
    }
    asked = [fill[kind] for kind in rng.sample(("animal", "thing", "place"), rng.randint(2, 3))]
    middles = rng.sample(_MIDDLES, rng.randint(1, 6))
    sentences = [rng.choice(_OPENINGS), rng.choice(_FINDS), *middles, rng.choice(_ENDINGS)]
    # The thing is always told of: the only part of a story that no opening brings in.
    story = " ".join(sentences).format(**fill)
    return " ".join(sorted(asked)), rng.choice(_ASKS).format(listed(asked)), story


def story_words(key: str) -> list[str]:
    """The words a story was asked for, from its question's key."""
    return key.split()


def uses_words(story: str, key: str) -> bool:
    """Whether a story uses every word it was asked for."""
    return all(word in story for word in story_words(key))
