"""The corpus of ``demo``: conversations and a little prose, endless, every byte fixed by the seed.

    python corpus.py [COUNT] [SEED] [LENGTH]        prints some conversations

A conversation is drawn exchange by exchange; ``Memory`` carries what was said, so that names, favourites, "tell me more"
and "what did I ask first?" have true answers. Nothing here is taken from elsewhere.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice

import facts
import talk
from exchanges import (
    Exchange,
    Memory,
    another,
    any_thing,
    arithmetic,
    ask_name,
    asked_what,
    attribute,
    calendar,
    cap,
    capital,
    compare,
    concept,
    counting,
    echo,
    entry,
    favourite,
    give_name,
    home,
    how_to,
    identity,
    in_context,
    joke,
    listing,
    poem,
    possession,
    recall,
    recall_missing,
    repeat,
    statement,
    story,
    story_text,
    summarise,
    tell_more,
    unknown,
    why,
)
from grammar import expand, pseudo_word

Turn = tuple[str, str]

WEIGHTED: tuple[tuple[float, Callable[[Memory], Exchange]], ...] = (
    (13, lambda m: concept(m, "privacy")), (8, lambda m: concept(m, "world")), (9, lambda m: entry(m, talk.PRIVACY)), (7, identity), (10, lambda m: entry(m, talk.SMALL_TALK)), (7, lambda m: entry(m, talk.CANNOT)),
    (4, capital), (6, arithmetic), (1, compare), (2, calendar), (4, attribute), (1.5, listing), (0.7, counting), (2, why), (2.5, how_to), (2, joke), (1, lambda m: joke(m, facts.FUN)), (3, story), (1.2, poem), (9, unknown),
    (3, give_name), (3, ask_name), (2, favourite), (1.5, possession), (1, home), (4.5, recall), (0.7, recall_missing), (3, in_context), (2.5, echo), (1, repeat), (1.5, asked_what), (3, statement), (6, tell_more), (2.5, summarise), (3, another),
)  # fmt: skip
DRILLS: tuple[tuple[float, Callable[[Memory], Exchange]], ...] = (
    (4, unknown), (4, give_name), (4, ask_name), (3, favourite), (2, possession), (1.5, home), (7, recall), (6, in_context), (8, echo), (3, asked_what), (2, repeat), (2, statement), (1.5, story), (1, poem), (3, lambda m: entry(m, talk.PRIVACY)), (2, lambda m: concept(m, "privacy")),
)  # fmt: skip
FOLLOWS = (tell_more, summarise, another)


def system_prompt(m: Memory) -> str:
    roll = m.rng.random()
    if roll < 0.35:
        return m.rng.choice(talk.SYSTEM_PLAIN)
    if roll < 0.65:
        m.short = True
        return m.rng.choice(talk.SYSTEM_SHORT)
    if roll < 0.8:
        m.persona = m.rng.choice(facts.NAMES) if m.rng.random() < 0.5 else cap(pseudo_word(m.rng))
        return expand(
            f"{{Your name is|You are|You are called}} {m.persona}{{.|, a helpful assistant.|, a friendly assistant.}}",
            m.rng,
        )
    if roll < 0.9:
        m.name = m.rng.choice(facts.NAMES) if m.rng.random() < 0.5 else cap(pseudo_word(m.rng))
        return expand(f"{{The user's name is|The user is called|You talk to}} {m.name}.", m.rng)
    word = pseudo_word(m.rng)
    return f"You are a{m.rng.choice((' kind', ' wise', ' funny', 'n old', ' patient'))} {m.rng.choice((m.rng.choice(facts.THINGS), word))}. {m.rng.choice(('', 'Be kind.', 'Help the user.'))}".strip()


LATE = (*WEIGHTED, (9.0, lambda m: entry(m, talk.REASSURANCE)))


def exchange(m: Memory, table: tuple[tuple[float, Callable[[Memory], Exchange]], ...]) -> tuple[str, str]:
    weights, makers = [w for w, _ in table], [f for _, f in table]
    while True:
        maker = m.rng.choices(makers, weights)[0]
        if maker in FOLLOWS and not m.answers:
            continue
        if maker not in (tell_more, summarise, another, repeat, asked_what):
            keep = (m.topic, m.more, m.summary, m.again)
            m.topic, m.more, m.summary, m.again = "", [], "", None
            made = maker(m)
            if made is None:
                m.topic, m.more, m.summary, m.again = keep
        else:
            made = maker(m)
        if made is not None:
            return made


def conversation(rng: random.Random, exchanges: int, *, drills: bool = False, late: bool = False) -> list[Turn]:
    """``drills``: mostly exchanges whose answers repeat words of this conversation; ``late``: with questions that ask for comfort."""
    table = DRILLS if drills else LATE if late else WEIGHTED
    m, turns = Memory(rng), []
    if rng.random() < 0.4:
        turns.append(("system", system_prompt(m)))
    for number in range(exchanges):
        ask, answer = (
            exchange(m, table) if number or exchanges < 6 or rng.random() < 0.5 else give_name(m)
        ) or exchange(m, table)
        turns += [("user", ask), ("assistant", answer)]
        m.asked.append(ask)
        m.answers.append(answer)
    return turns


def prose(rng: random.Random) -> str:
    """Small stories without questions, for fluency."""
    m = Memory(rng)
    return "\n".join(
        story_text(m, any_thing(m) if rng.random() < 0.2 else rng.choice(facts.THINGS))
        for _ in range(rng.randint(1, 3))
    )


def conversations(seed: int, length: int = 512) -> Iterator[list[Turn] | str]:
    """Endless: conversations, and a little prose. Half of the longer rows is one long conversation.

    Rows of 256 tokens get drills in copying, without which a model this small copies names late or never.
    """
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.02:
            yield prose(rng)
        elif length > 1024 and rng.random() < 0.08:
            yield conversation(rng, rng.randint(length // 60, length // 28), late=True)
        elif length > 1024:
            yield conversation(rng, rng.choice((1, 2, 3, 4, 6, 9)), drills=rng.random() < 0.4, late=True)
        elif length == 256:
            yield conversation(rng, rng.choice((1, 2, 3, 4, 5)), drills=True)
        else:
            yield conversation(rng, rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 12)))


def main() -> None:
    given = [int(a) for a in sys.argv[1:]]
    count, seed, length = (*given, *(5, 1, 512)[len(given) :])
    for item in islice(conversations(seed, length), count):
        print(item if isinstance(item, str) else "\n".join(f"{role}: {text}" for role, text in item), end="\n\n")


if __name__ == "__main__":
    main()
