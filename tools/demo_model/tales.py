"""Stories and rhymes, drawn sentence by sentence from alternatives of our own."""

from __future__ import annotations

import random

import facts
import words
from grammar import expand, pseudo_word

TRAITS = "{curious|kind|shy|brave|clever|sleepy|proud|patient|cheerful|careful|hungry|lonely}"
GOALS = (
    ("wanted to see the sea", "saw the sea, and it was wider than anything"), ("was looking for a friend", "had found a friend"), ("wanted to learn to sing", "could sing one song by heart"),
    ("had lost a red button", "held the red button again"), ("wanted to build a small boat", "sat in a boat that did not leak"), ("wished for a quiet place to read", "had found the quietest place of all"),
    ("had to carry a letter over the hill", "had brought the letter to the right door"), ("wanted to know what was behind the forest", "knew what was behind the forest: another forest, full of light"),
    ("was afraid of the dark", "was not afraid of the dark any more"), ("wanted to bake the best bread in the village", "took a warm bread out of the oven, and it was the best"),
    ("wanted to keep a secret safe", "had learned to check the door before telling a secret"),
)  # fmt: skip
MEETINGS = (
    "On the way it met {an old tortoise|a grey owl|a tired sailor|two noisy crows|a girl with a lantern|a baker with a basket} who {knew the way|asked a strange question|shared some bread|was looking for something too|laughed at everything}.",
    "Near the {PLACE} stood {a tall stranger|a small door|a broken cart|a tree with silver leaves}, and {it was a riddle|that was new|it looked friendly}.",
    "At noon the HERO {rested under a tree|crossed a bridge|climbed a wall|hid from the wind} and {heard a soft voice|found A_THING|thought of home|counted the clouds}.",
    "Then {a storm came up|the path split in two|the light went out|the bridge was gone|fog came in from the river}, and the HERO {did not know what to do|had to wait|nearly turned back|took a deep breath}.",
    "\"{Do not hurry|Look twice|Ask before you trust|Follow the river|Begin with the small things},\" said {the owl|a voice|the tortoise|the old woman}, and that was good advice.",
    "{In a drawer|Under a stone|Behind the mill|In the grass} lay A_THING, and it {still worked|was warm|belonged to somebody|shone a little}.",
)  # fmt: skip
TURNS = (
    "So they {worked together|shared what they had|tried it once more|made a plan}, and {slowly|after a while|before the evening} it {went better|began to work|was done}.",
    "{A child|A fox|The baker|An old friend} came by and {helped without a word|had just the right thing|knew a song about it|showed the way}.",
    "The HERO tried {once, twice and a third time|again and again|in a new way}, and {then it worked|the third time was the right one}.",
)  # fmt: skip
LESSONS = (
    "{Sometimes a small step is enough.|It is good to ask for help.|Patience is a kind of courage.|Friends make every road shorter.|What is checked once need not be feared.|Home looks new when you come back.}",
)  # fmt: skip
LINES = (
    ("The X is {quiet|sleeping|waiting|shining} in the {night|light}", "{and all around it things are bright|and every little lamp is bright}"),
    ("I saw the X {one early day|along the way}", "{and wished that it would always stay|it smiled, and then it went away}"),
    ("The X was {small|shy}, the world was wide", "{it found a friend to walk beside|and kept a little hope inside}"),
    ("O X, {so gentle and so near|so far away and still so dear}", "{I am so glad to have you here|you are the best of all the year}"),
    ("{The wind was cold, the hill was steep|The stars came out, the night was deep}", "{the X lay down and fell asleep|the X had promises to keep}"),
    ("{Above the roofs, beneath the sky|Where clouds and swallows hurry by}", "{the X looked up and wondered why|the X sang softly, low and high}"),
    ("{Come rain, come snow, come golden sun|When all the work of day is done}", "{the X and I have lots of fun|the X goes home to everyone}"),
)  # fmt: skip
POEM_TOPICS = (*facts.THINGS, *words.THINGS, "rain", "sea", "wind", "snow", "moon", "autumn", "spring", "summer", "winter", "morning", "forest", "mountain", "garden", "enclave", "secret", "computer", "penguin", "city", "night")  # fmt: skip


def article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def hero(rng: random.Random) -> str:
    pools = (
        facts.THINGS,
        words.KINDS["animal"],
        words.KINDS["bird"],
        words.KINDS["job"],
        ["penguin", "robot", "princess"],
    )
    return rng.choice(rng.choice(pools)) if rng.random() < 0.85 else pseudo_word(rng)


def filled(template: str, rng: random.Random, who: str) -> str:
    thing = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}"
    text = template.replace("A_THING", article(thing)).replace("PLACE", rng.choice(words.PLACES))
    return expand(text.replace("HERO", who), rng)


def tale(rng: random.Random, who: str, name: str = "", place: str = "") -> tuple[str, str]:
    """A story of six to nine sentences, and the same in one."""
    goal, end = rng.choice(GOALS)
    place = place or rng.choice(words.PLACES)
    called = f" called {name}" if name else ""
    first = f"{{Once there was|Once upon a time there was|Long ago there was|In a house near the {place} lived}} {article(f'XX {who}')}{called}. {{The {who}|{name or 'It'}}} {goal}."
    trait = expand(TRAITS, rng)
    first = first.replace(article(f"XX {who}"), article(f"{trait} {who}"))
    parts = [first, f"{{One morning|One day|One cold evening}} the {who} set out for the {place}."]
    parts += rng.sample(MEETINGS, rng.randint(1, 3))
    parts += [rng.choice(TURNS), f"{{When the sun went down|In the end|That night|At last}} the {who} {end}."]
    if rng.random() < 0.5:
        parts.append(LESSONS[0])
    text = " ".join(filled(part, rng, who) for part in parts)
    return text, f"{article(f'{trait} {who}')} {goal} and in the end {end.split(',')[0]}."


def more_of_it(rng: random.Random, who: str) -> str:
    """How a story goes on."""
    parts = ["{The next day|A week later|In the spring} the HERO came to the PLACE again.", *rng.sample(MEETINGS, 2), rng.choice(TURNS), "And the HERO {went home happy|had a story to tell|slept very well}."]  # fmt: skip
    return " ".join(filled(part, rng, who) for part in parts)


def rhyme(rng: random.Random, topic: str) -> str:
    pairs = rng.sample(LINES, 2)
    lines = [expand(line.replace("X", topic), rng) for pair in pairs for line in pair]
    return f"{lines[0]},\n{lines[1]}.\n{lines[2]},\n{lines[3]}."
