"""The corpus of ``demo``: conversations and a little prose, endless, every byte fixed by the seed.

    python corpus.py [COUNT] [SEED] [LENGTH]        prints some conversations

A conversation is drawn exchange by exchange; ``Memory`` carries what was said, so that names, favourites, "tell me more"
and "what did I ask first?" have true answers. Nothing here is taken from elsewhere.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import islice

import facts
import tales
import talk
import tasks
from calls import tool_conversation
from exchanges import (
    Exchange,
    Memory,
    another,
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
    possession,
    ranked,
    recall,
    recall_missing,
    repeat,
    statement,
    summarise,
    tell_more,
    unknown,
    why,
)
from grammar import expand, pseudo_word

Turn = tuple[str, str]
Table = tuple[tuple[float, Callable[[Memory], Exchange]], ...]

WEIGHTED: Table = (
    (12, lambda m: concept(m, "privacy")), (14, lambda m: concept(m, "product")), (13, lambda m: concept(m, "world")), (2.5, lambda m: concept(m, "people")), (9, lambda m: entry(m, talk.PRIVACY)), (5, lambda m: entry(m, talk.REASSURANCE)), (7, identity), (10, lambda m: entry(m, talk.SMALL_TALK)), (7, lambda m: entry(m, talk.CANNOT)),
    (4, capital), (3, arithmetic), (1, compare), (1.5, ranked), (2, calendar), (4, attribute), (0.7, counting), (3, why), (3.5, how_to), (2.5, joke), (1.2, lambda m: joke(m, facts.FUN)), (9, unknown),
    (3.5, give_name), (3.5, ask_name), (2.5, favourite), (2, possession), (1.5, home), (5.5, recall), (0.9, recall_missing), (3, in_context), (2.5, echo), (1, repeat), (1.5, asked_what), (3, statement), (8, tell_more), (3.5, summarise), (5, another), *tasks.TABLE,
)  # fmt: skip
DRILLS: Table = (
    (4, unknown), (4, give_name), (4, ask_name), (3, favourite), (2, possession), (1.5, home), (7, recall), (6, in_context), (8, echo), (3, asked_what), (2, repeat), (2, statement), (3, lambda m: entry(m, talk.PRIVACY)), (2, lambda m: concept(m, "privacy")), (2, lambda m: concept(m, "product")), *tasks.COPYING,
)  # fmt: skip
PLAIN: Table = (
    (3, lambda m: concept(m, "privacy")), (3, lambda m: concept(m, "product")), (2, lambda m: concept(m, "world")), (2, lambda m: entry(m, talk.PRIVACY)), (3, lambda m: entry(m, talk.SMALL_TALK)), (1, identity), (1, capital), (1, tasks.listing_of),
)  # fmt: skip
FOLLOWS = (tell_more, summarise, another)
KEEPING = (*FOLLOWS, repeat, asked_what)
MANNERS: tuple[tuple[str, str, Callable[[str, str], str]], ...] = (
    ("{Answer|Write|Always answer|Please answer} in capital letters{.| only.}", "in capital letters:", lambda text, _: text.upper()),
    ("{Answer|Write|Always answer} in small letters{.| only.}", "in small letters:", lambda text, _: text.lower()),
    ("{End|Finish} {every|each} answer with WORD.", "end your answer with WORD:", lambda text, word: f"{text} {word}"),
    ("{Begin|Start} {every|each} answer with WORD.", "begin your answer with WORD:", lambda text, word: f"{word} {text}"),
    ('{Answer|Reply|Always answer} in JSON with the key "KEY".', 'answer in JSON with the key "KEY":', lambda text, word: json.dumps({word: text}, ensure_ascii=False)),
    ("Put {every|each} answer in quotation marks.", "put your answer in quotation marks:", lambda text, _: f'"{text}"'),
)  # fmt: skip
INTERJECTIONS = ("Meow!", "Ahoy!", "Over and out.", "Dear friend,", "Beep!", "Amen.", "Hooray!", "Yours, Robot.", "Listen:", "***", "OK.", "Woof!", "Captain,", "Thank you.")  # fmt: skip
KEYS = ("answer", "text", "reply", "result", "message", "output")


def manner(rng: random.Random, *, inline: bool) -> tuple[str, Callable[[str], str]]:
    """A wish for the form of answers, and what it makes of one."""
    whole, short, change = rng.choice(MANNERS)
    word = rng.choice(INTERJECTIONS) if rng.random() < 0.7 else cap(pseudo_word(rng)) + rng.choice(("!", "."))
    word = rng.choice(KEYS) if "KEY" in short else word
    wish = (short if inline else expand(whole, rng)).replace("WORD", word).replace("KEY", word)
    return wish, lambda text: change(text, word)


def system_prompt(m: Memory) -> str:
    roll = m.rng.random()
    if roll < 0.27:
        return m.rng.choice(talk.SYSTEM_PLAIN)
    if roll < 0.48:
        m.short = True
        return m.rng.choice(talk.SYSTEM_SHORT)
    if roll < 0.62:
        m.persona = m.rng.choice(facts.NAMES) if m.rng.random() < 0.5 else cap(pseudo_word(m.rng))
        return expand(
            f"{{Your name is|You are|You are called}} {m.persona}{{.|, a helpful assistant.|, a friendly assistant.}}",
            m.rng,
        )
    if roll < 0.7:
        m.name = m.rng.choice(facts.NAMES) if m.rng.random() < 0.5 else cap(pseudo_word(m.rng))
        return expand(f"{{The user's name is|The user is called|You talk to}} {m.name}.", m.rng)
    if roll < 0.95:
        wish, m.manner = manner(m.rng, inline=False)
        return f"{m.rng.choice(talk.SYSTEM_PLAIN)} {wish}" if m.rng.random() < 0.4 else wish
    word = pseudo_word(m.rng)
    return f"You are a{m.rng.choice((' kind', ' wise', ' funny', 'n old', ' patient'))} {m.rng.choice((m.rng.choice(facts.THINGS), word))}. {m.rng.choice(('', 'Be kind.', 'Help the user.'))}".strip()


def exchange(m: Memory, table: Table) -> tuple[str, str]:
    if m.open_question and m.rng.random() < 0.85 and (made := tasks.quiz(m)):
        return made
    m.open_question = None
    weights, makers = [w for w, _ in table], [f for _, f in table]
    while True:
        maker = m.rng.choices(makers, weights)[0]
        if maker in FOLLOWS and not m.answers:
            continue
        if maker not in KEEPING:
            keep = (m.topic, m.more, m.summary, m.again)
            m.topic, m.more, m.summary, m.again = "", [], "", None
            made = maker(m)
            if made is None:
                m.topic, m.more, m.summary, m.again = keep
        else:
            made = maker(m)
        if made is not None:
            return made


def conversation(rng: random.Random, exchanges: int, *, drills: bool = False) -> list[Turn]:
    """``drills``: mostly exchanges whose answers repeat words of this conversation."""
    table = DRILLS if drills else WEIGHTED
    m, turns = Memory(rng), []
    if rng.random() < 0.4:
        turns.append(("system", system_prompt(m)))
    for number in range(exchanges):
        ask, answer = (
            exchange(m, table) if number or exchanges < 6 or rng.random() < 0.5 else give_name(m)
        ) or exchange(m, table)
        said = m.manner(answer) if m.manner else answer
        if not m.manner and rng.random() < 0.025 and not answer.startswith("You wrote"):
            wish, change = manner(rng, inline=True)
            ask, answer = f"{cap(wish)} {ask}", change(answer)
            said = answer
        turns += [("user", ask), ("assistant", said)]
        m.asked.append(ask)
        m.answers.append(answer)
    return turns


def tools(rng: random.Random) -> list[Turn]:
    told = rng.choice((*talk.SYSTEM_PLAIN, "", "", "", "", ""))
    return tool_conversation(rng, told, lambda m: exchange(m, PLAIN))


def prose(rng: random.Random) -> str:
    """Small stories without questions, for fluency."""
    return "\n".join(tales.tale(rng, tales.hero(rng))[0] for _ in range(rng.randint(1, 3)))


def conversations(seed: int, length: int = 512) -> Iterator[list[Turn] | str]:
    """Endless: conversations, some of them with tools, and a little prose. Half of the long rows is long conversations.

    Rows of 256 tokens have drills in copying only.
    """
    rng = random.Random(seed)
    while True:
        roll = rng.random()
        if roll < 0.02:
            yield prose(rng)
        elif roll < 0.1:
            yield tools(rng)
        elif length == 256:
            yield conversation(rng, rng.choice((1, 2, 3, 4, 5)), drills=True)
        elif length > 1024 and roll < 0.17:
            yield conversation(rng, rng.randint(length // 90, length // 40))
        else:
            yield conversation(rng, rng.choice((1, 1, 1, 2, 2, 3, 4, 5, 6, 8, 12)), drills=rng.random() < 0.25)


def main() -> None:
    given = [int(a) for a in sys.argv[1:]]
    count, seed, length = (*given, *(5, 1, 512)[len(given) :])
    for item in islice(conversations(seed, length), count):
        print(item if isinstance(item, str) else "\n".join(f"{role}: {text}" for role, text in item), end="\n\n")


if __name__ == "__main__":
    main()
