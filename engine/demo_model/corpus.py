"""Makes the text the toy learns from: short questions whose answers can be checked.

Each task is a small function from a random generator to a `Question`. About one question in ten
is held out *by its content*: `is_held_out` hashes the task and the question's key, so that a held
out pair of numbers or word is never trained on in any wording. Tasks with few contents (opposites,
days, months, the alphabet) add the wording to the key, and the report says so.

Words whose letters matter are in capitals, because the tokenizer keeps capitals apart and melts
small letters into whole words.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from engine.demo_model.stories import STORY_TASK, draw_story
from engine.demo_model.words import (
    ALPHABET,
    DAYS,
    LETTER_WORDS,
    MONTHS,
    NOUNS,
    OPPOSITES,
    ORDINALS,
)

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; for a story, with one story that would do."""

    task: str
    key: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question, how often it is trained on, and what its held-out split is made by."""

    name: str
    draw: Callable[[Random], tuple[str, str, str]]  # key, prompt, answer
    weight: float = 1.0
    held_out_by: str = "content"


def is_held_out(task: str, key: str) -> bool:
    """Whether a question is kept out of training; the same on every machine and in every run."""
    digest = hashlib.blake2b(f"{task}:{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**32


def draw_question(task: Task, rng: Random, *, held_out: bool) -> Question:
    """One question of a task from the asked side of the split."""
    while True:
        key, prompt, answer = task.draw(rng)
        if is_held_out(task.name, key) == held_out:
            return Question(task.name, key, prompt, answer)


def training_questions(rng: Random) -> Iterator[Question]:
    """Endless training questions, tasks mixed by their weights."""
    weights = [task.weight for task in TASKS]
    while True:
        yield draw_question(rng.choices(TASKS, weights)[0], rng, held_out=False)


def held_out_questions(task: Task, count: int, seed: int = 1234) -> list[Question]:
    """Up to `count` held-out questions of a task with distinct prompts, in a fixed order."""
    rng = Random(f"{seed}:{task.name}")
    found: dict[str, Question] = {}
    for _ in range(50 * count):  # small tasks hold fewer than `count` questions
        question = draw_question(task, rng, held_out=True)
        found.setdefault(question.prompt, question)
        if len(found) == count:
            break
    return list(found.values())


def _number(rng: Random) -> int:
    """A number below 1000 with one, two or three digits alike."""
    return rng.randrange(rng.choice((10, 100, 1000)))


def _word(rng: Random) -> str:
    """A word in capitals: half the time a real one, else three to five random letters."""
    if rng.random() < 0.5:
        return rng.choice(LETTER_WORDS)
    return "".join(rng.choices(ALPHABET, k=rng.randint(3, 5)))


def _say(rng: Random, *wordings: str) -> str:
    return rng.choice(wordings)


def _add(rng: Random) -> tuple[str, str, str]:
    a, b = rng.randrange(100), rng.randrange(100)
    ask = _say(rng, "What is {} + {}?", "How much is {} plus {}?", "Add {} and {}.")
    return f"{a}+{b}", ask.format(a, b), str(a + b)


def _subtract(rng: Random) -> tuple[str, str, str]:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    ask = _say(rng, "What is {} - {}?", "How much is {} minus {}?")
    return f"{a}-{b}", ask.format(a, b), str(a - b)


def _neighbour_number(rng: Random) -> tuple[str, str, str]:
    number, step, side = rng.randint(1, 998), *rng.choice(((1, "after"), (-1, "before")))
    ask = _say(rng, "What number comes {} {}?", "Which number is just {} {}?")
    return f"{number}{side}", ask.format(side, number), str(number + step)


def _compare(rng: Random) -> tuple[str, str, str]:
    a, b = _number(rng), _number(rng)
    while a == b:
        b = _number(rng)
    kind = rng.choice(("larger", "smaller"))
    ask = _say(rng, "Which is {}, {} or {}?", "Which number is {}: {} or {}?")
    answer = max(a, b) if kind == "larger" else min(a, b)
    return f"{min(a, b)},{max(a, b)}", ask.format(kind, a, b), str(answer)


def _sort(rng: Random) -> tuple[str, str, str]:
    numbers = rng.sample(range(100), 3)
    ask = _say(rng, "Sort these numbers: {}.", "Put these numbers in order: {}.")
    ordered = ", ".join(map(str, sorted(numbers)))
    return ordered, ask.format(", ".join(map(str, numbers))), ordered


def _parity(rng: Random) -> tuple[str, str, str]:
    number = _number(rng)
    ask = _say(rng, "Is {} even or odd?", "Is the number {} odd or even?")
    return str(number), ask.format(number), ("even", "odd")[number % 2]


def _count_items(rng: Random) -> tuple[str, str, str]:
    items = rng.sample(NOUNS, rng.randint(1, 7))
    ask = _say(rng, "How many words are in this list: {}?", "Count the words: {}.")
    listed = ", ".join(items)
    return listed, ask.format(listed), str(len(items))


def _pick_item(rng: Random) -> tuple[str, str, str]:
    items = rng.sample(NOUNS, rng.randint(3, 4))
    index = rng.choice((*range(len(items)), -1))
    place = "last" if index < 0 else ORDINALS[index]
    ask = _say(rng, "What is the {} word in this list: {}?", "Give me the {} word of {}.")
    listed = ", ".join(items)
    return listed, ask.format(place, listed), items[index]


def _repeat(rng: Random) -> tuple[str, str, str]:
    word, times = rng.choice(NOUNS), rng.randint(2, 6)
    ask = _say(rng, "Say {} {} times.", "Repeat the word {} {} times.")
    return f"{word}{times}", ask.format(word, times), " ".join([word] * times)


def _reverse(rng: Random) -> tuple[str, str, str]:
    word = _word(rng)
    ask = _say(rng, "Reverse the word {}.", "What is {} backwards?", "Spell {} backwards.")
    return word, ask.format(word), word[::-1]


def _spell(rng: Random) -> tuple[str, str, str]:
    word = _word(rng)
    return word, _say(rng, "Spell {}.", "How do you spell {}?").format(word), "-".join(word)


def _join(rng: Random) -> tuple[str, str, str]:
    a, b = _word(rng), _word(rng)
    return f"{a}{b}", _say(rng, "Join {} and {}.", "Put {} and {} together.").format(a, b), a + b


def _pick_letter(rng: Random) -> tuple[str, str, str]:
    word = _word(rng)
    index = rng.choice((0, 1, 2, -1))
    place = "last" if index < 0 else ORDINALS[index]
    ask = _say(rng, "What is the {} letter of {}?", "Which letter is {} in {}?")
    return word, ask.format(place, word), word[index]


def _count_letters(rng: Random) -> tuple[str, str, str]:
    word = "".join(rng.choices(ALPHABET, k=rng.randint(2, 8))) if rng.random() < 0.5 else _word(rng)
    ask = _say(rng, "How many letters are in {}?", "How long is the word {}?")
    return word, ask.format(word), str(len(word))


def _count_one_letter(rng: Random) -> tuple[str, str, str]:
    letter = rng.choice(ALPHABET)
    others = ALPHABET.replace(letter, "")
    word = "".join(
        letter if rng.random() < 0.4 else rng.choice(others) for _ in range(rng.randint(3, 5))
    )
    ask = _say(rng, "How many times is {} in {}?", "How often does {} appear in {}?")
    return f"{letter}{word}", ask.format(letter, word), str(word.count(letter))


def _neighbour_letter(rng: Random) -> tuple[str, str, str]:
    index, step, side = rng.randint(1, 24), *rng.choice(((1, "after"), (-1, "before")))
    ask = _say(
        rng,
        "Which letter comes {} {}?",
        "What letter is {} {}?",
        "Name the letter {} {}.",
        "In the alphabet, what comes {} {}?",
    ).format(side, ALPHABET[index])
    return ask, ask, ALPHABET[index + step]


def _day(rng: Random) -> tuple[str, str, str]:
    start, count, step, side = (
        rng.randrange(7),
        rng.randint(1, 9),
        *rng.choice(((1, "after"), (-1, "before"))),
    )
    if count == 1:
        ask = _say(
            rng,
            "What day comes {} {}?",
            "Which day is the day {} {}?",
            "Name the day {} {}.",
            "In the week, what comes {} {}?",
        ).format(side, DAYS[start])
    else:
        ask = _say(
            rng,
            "What day comes {} days {} {}?",
            "Which day is {} days {} {}?",
            "Name the day {} days {} {}.",
        ).format(count, side, DAYS[start])
    return ask, ask, DAYS[(start + step * count) % 7]


def _month(rng: Random) -> tuple[str, str, str]:
    index, step, side = rng.randrange(12), *rng.choice(((1, "after"), (-1, "before")))
    ask = _say(
        rng,
        "What month comes {} {}?",
        "Which month is {} {}?",
        "Name the month {} {}.",
        "In the year, what comes {} {}?",
    ).format(side, MONTHS[index])
    return ask, ask, MONTHS[(index + step) % 12]


def _opposite(rng: Random) -> tuple[str, str, str]:
    word, other = rng.sample(rng.choice(OPPOSITES), 2)
    ask = _say(
        rng,
        "What is the opposite of {}?",
        "Give me the opposite of {}.",
        "Which word means the opposite of {}?",
    ).format(word)
    return ask, ask, other


TASKS: Sequence[Task] = (
    Task("add", _add, weight=4.0, held_out_by="pair of numbers"),
    Task("subtract", _subtract, weight=4.0, held_out_by="pair of numbers"),
    Task("number before or after", _neighbour_number, held_out_by="number"),
    Task("compare", _compare, weight=1.5, held_out_by="pair of numbers"),
    Task("sort three numbers", _sort, weight=2.0, held_out_by="three numbers"),
    Task("even or odd", _parity, weight=0.5, held_out_by="number"),
    Task("count a list", _count_items, weight=0.5, held_out_by="list"),
    Task("pick from a list", _pick_item, weight=1.5, held_out_by="list"),
    Task("repeat a word", _repeat, weight=0.5, held_out_by="word and count"),
    Task("reverse a word", _reverse, weight=2.0, held_out_by="word"),
    Task("spell a word", _spell, held_out_by="word"),
    Task("join two words", _join, weight=2.0, held_out_by="pair of words"),
    Task("pick a letter", _pick_letter, held_out_by="word"),
    Task("count letters", _count_letters, weight=0.5, held_out_by="word"),
    Task("count one letter", _count_one_letter, weight=1.5, held_out_by="letter and word"),
    Task("letter before or after", _neighbour_letter, weight=0.5, held_out_by="wording and letter"),
    Task("day before or after", _day, weight=1.5, held_out_by="wording and day"),
    Task("month before or after", _month, weight=0.5, held_out_by="wording and month"),
    Task("opposite", _opposite, weight=0.5, held_out_by="wording and word"),
)

STORIES = Task(STORY_TASK, draw_story, held_out_by="words asked for")
