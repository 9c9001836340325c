"""The exchanges: one function per kind of question, each giving (question, true answer) or nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import facts
import product
import talk
import world
from grammar import expand, pseudo_word, rough

Exchange = tuple[str, str] | None
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@dataclass(slots=True)
class Memory:
    """What this conversation has said so far; ``short`` when the system prompt asks for short answers.

    ``manner``: what it asks to be done with every answer; ``result``: the last sum's place in the conversation and value;
    ``kept``: what was to be remembered; ``basket``: the shopping list; ``open_question``: of a quiz, with its answer.
    """

    rng: random.Random
    short: bool = False
    persona: str = ""
    name: str = ""
    told: dict[str, str] = field(default_factory=dict)
    more: list[str] = field(default_factory=list)
    topic: str = ""
    summary: str = ""
    asked: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    again: Callable[[Memory], Exchange] | None = None
    jokes: list[str] = field(default_factory=list)
    manner: Callable[[str], str] | None = None
    result: tuple[int, int] = (-1, 0)
    kept: dict[str, str] = field(default_factory=dict)
    basket: list[str] = field(default_factory=list)
    open_question: tuple[str, str] | None = None


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def asked(m: Memory, template: str) -> str:
    """A question as a person may type it."""
    return rough(cap(expand(template, m.rng)), m.rng)


def parse(block: str) -> list[tuple[list[str], str, list[str]]]:
    lines = [line.split(" | ") for line in block.strip().splitlines()]
    return [
        ([n.strip() for n in parts[0].split(",")], parts[1].strip(), [p.strip() for p in parts[2:]]) for parts in lines
    ]


CONCEPTS = {
    "privacy": parse(facts.PRIVACY),
    "world": parse(facts.WORLD),
    "product": parse(product.PRODUCT),
    "people": parse(world.PEOPLE),
}
ASK_WHAT = (
    "{what is|what's|what are|whats} X?", "{what is|what's} X?", "What is X?", "{explain|define|describe} X{ please|}.", "{tell me about|tell me something about|talk about} X.", "Can you {explain|tell me about|describe} X?",
    "{please explain|please tell me about} X.", "What does X mean?", "{do you know|do you know what} X {is|}?", "{I want to know about|I would like to learn about|teach me about|I am curious about} X.", "What do you know about X?",
    "{explain|tell me} {what X is|what X means}.", "X?", "How would you {explain|define|describe} X?", "Hey, what is X?", "Could you tell me what X is?", "So what is X?", "And what is X?", "What exactly is X?", "Tell me what you know about X.", "give me a definition of X",
)  # fmt: skip
ASK_WHO = ("{who was|who is|tell me about|do you know|have you heard of|what do you know about|who exactly was} X?",)
ASK_DETAIL = (
    "Explain X in detail.",
    "Tell me everything about X.",
    "Tell me more about X.",
    "Give me a long answer: what is X?",
    "What is X? Please explain it well.",
    "I want to know more about X.",
)
ASK_SHORT = (
    "What is X, in one sentence?",
    "Explain X in one sentence.",
    "X in short?",
    "Explain X briefly.",
    "Explain X to a child.",
    "What is X in simple words?",
    "Give me a short definition of X.",
)


def concept(m: Memory, kind: str) -> Exchange:
    names, what, more = m.rng.choice(CONCEPTS[kind])
    name, roll = m.rng.choice(names), m.rng.random()
    if m.rng.random() < 0.15:
        name = name.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    first, answer = what.split(". ")[0].rstrip(".") + ".", what
    m.topic, m.more, m.summary = names[0], list(more), first
    if roll < 0.1 and kind != "people":
        ask = m.rng.choice(ASK_SHORT)
        answer, m.more = first, list(more)
    elif roll < 0.2 and not m.short:
        ask = m.rng.choice(ASK_DETAIL)
        answer, m.more = f"{what} {more[0]}", list(more[1:])
    else:
        ask = m.rng.choice(ASK_WHO if kind == "people" else ASK_WHAT)
        answer = first if m.short else what
    return asked(m, ask.replace("X", name)), answer


def tell_more(m: Memory) -> Exchange:
    if not m.topic:
        return None
    ask = asked(
        m,
        "{tell me more|more|go on|continue|can you tell me more|more please|and|what else|anything else|tell me more about {that|it}|i want to know more|more details please|please go on|can you elaborate|elaborate|say more}{?|.|}",
    )
    if not m.more:
        return ask, "That is all that I know about it. I am only a small demo model."
    return ask, m.more.pop(0)


def summarise(m: Memory) -> Exchange:
    if not m.summary:
        return None
    ask = expand(
        "{summarise that|summarize that|summarise|sum it up|in short|can you summarise that|make it shorter|shorter please|give me the short version|tl;dr|in one sentence please|summarize this|the short version please}{?|.|}",
        m.rng,
    )
    return rough(cap(ask), m.rng), f"In short: {m.summary}"


def entry(m: Memory, table: tuple[tuple[str, str, str], ...]) -> Exchange:
    ask, answer, short = m.rng.choice(table)
    text = expand(ask, m.rng)
    for slot, words in (("CITY", facts.CITIES), ("THING", facts.THINGS), ("NAME", facts.NAMES)):
        while slot in text:
            text = text.replace(slot, m.rng.choice(words), 1)
    if m.rng.random() < 0.06:
        text = expand("{hey|um|ok|so|well|please|tell me|one question:|hello,|i wonder,}", m.rng) + " " + text
    text = "".join(" " + w if w else w for w in text.split(" ")).strip()
    spoken = {"i": "I", "i'm": "I'm"}
    text = " ".join(spoken.get(w, w) for w in text.split(" "))
    return rough(cap(text), m.rng), short if m.short else expand(answer, m.rng)


def identity(m: Memory) -> Exchange:
    if m.persona and m.rng.random() < 0.6:
        ask = expand(
            "{who are you|what is your name|what's your name|what are you called|do you have a name|how should i call you}?",
            m.rng,
        )
        return rough(
            cap(ask), m.rng
        ), f"I am {m.persona}." if m.short else f"I am {m.persona}. Behind that name I am cloister's demo model, a toy."
    if m.persona:
        return None
    return entry(m, talk.IDENTITY)


def capital(m: Memory) -> Exchange:
    country = m.rng.choice(list(facts.CAPITALS))
    city, roll = facts.CAPITALS[country], m.rng.random()
    m.again = None
    if roll < 0.7:
        ask = expand(
            f"{{what is the capital of|what's the capital of|which city is the capital of|tell me the capital of|name the capital of|do you know the capital of|capital of|the capital city of}} {country}?",
            m.rng,
        )
        return rough(cap(ask), m.rng), f"{city}." if m.short else f"The capital of {country} is {city}."
    if roll < 0.85:
        ask = expand(f"{{where is|in which country is|what country is}} {city}?", m.rng)
        return rough(
            cap(ask.replace("what country is " + city, f"what country is {city} in")), m.rng
        ), f"{country}." if m.short else f"{city} is the capital of {country}."
    right = m.rng.random() < 0.5
    guess = city if right else m.rng.choice(list(facts.CAPITALS.values()))
    verdict = "Yes" if guess == city else "No"
    return rough(
        f"Is {guess} the capital of {country}?", m.rng
    ), f"{verdict}." if m.short else f"{verdict}, the capital of {country} is {city}."


def arithmetic(m: Memory) -> Exchange:
    r, roll = m.rng, m.rng.random()
    if roll < 0.45:
        a, b = r.randint(0, 12), r.randint(0, 12)
        sign, word, value = r.choice(("+", "plus")), "plus", a + b
    elif roll < 0.7:
        value, b = r.randint(0, 12), r.randint(0, 10)
        a, sign, word = value + b, r.choice(("-", "minus")), "minus"
    else:
        a, b = r.randint(0, 10), r.randint(0, 10)
        sign, word, value = r.choice(("*", "times", "x")), "times", a * b
    small = max(a, b) <= 12 and sign.isalpha() and sign != "x" and r.random() < 0.3
    left, right = (NUMBERS[a], NUMBERS[b]) if small else (str(a), str(b))
    ask = expand(
        f"{{what is|what's|how much is|calculate|compute|can you tell me what is|do you know what is|}} {left} {sign} {right}{{?|}}",
        r,
    )
    return rough(cap(ask), r, keep_words=True), f"{value}." if m.short else f"{a} {word} {b} is {value}."


def compare(m: Memory) -> Exchange:
    a, b = m.rng.sample(range(1, 40), 2)
    big = m.rng.random() < 0.6
    ask = (
        f"Which number is {'bigger' if big else 'smaller'}, {a} or {b}?"
        if m.rng.random() < 0.6
        else f"{a} or {b}, which is {'larger' if big else 'smaller'}?"
    )
    value = max(a, b) if big else min(a, b)
    return rough(ask, m.rng), f"{value}." if m.short else f"{value} is {'bigger' if big else 'smaller'}."


def ranked(m: Memory) -> Exchange:
    """Two things of which one is bigger, heavier, faster."""
    (more, less), row = m.rng.choice(list(world.RANKED.items()))
    i, j = sorted(m.rng.sample(range(len(row)), 2))
    want_more, pair = m.rng.random() < 0.6, [row[i], row[j]]
    m.rng.shuffle(pair)
    ask = f"{{which is|what is|which one is}} {more if want_more else less}, {pair[0]} or {pair[1]}?"
    best = row[j] if want_more else row[i]
    return asked(m, ask), f"{cap(best)} is {more if want_more else less}."


def calendar(m: Memory) -> Exchange:
    names, kind = m.rng.choice(((facts.DAYS, "day"), (facts.MONTHS, "month")))
    i, after = m.rng.randrange(len(names)), m.rng.random() < 0.6
    if m.rng.random() < 0.12:
        count = "seven days" if kind == "day" else "twelve months"
        whole = "a week" if kind == "day" else "a year"
        return rough(
            expand(f"{{How many {kind}s are in {whole}|How many {kind}s does {whole} have}}?", m.rng), m.rng
        ), f"There are {count} in {whole}."
    other = names[(i + (1 if after else -1)) % len(names)]
    word = "after" if after else "before"
    ask = expand(f"{{{{What|Which}} {kind} {{comes|is}} {word} {names[i]}|what comes {word} {names[i]}}}?", m.rng)
    return rough(cap(ask), m.rng), f"{other}." if m.short else f"{other} comes {word} {names[i]}."


def attribute(m: Memory) -> Exchange:
    r, roll = m.rng, m.rng.random()
    if roll < 0.3:
        thing = r.choice(list(facts.COLOURS))
        ask, short, answer = (
            f"What {r.choice(('colour', 'color'))} is {thing}?",
            facts.COLOURS[thing],
            f"{cap(thing)} is {facts.COLOURS[thing]}.",
        )
    elif roll < 0.45:
        thing = r.choice(list(facts.SOUNDS))
        ask = r.choice((f"What does {thing} say?", f"What sound does {thing} make?"))
        short, answer = facts.SOUNDS[thing], f"{cap(thing)} says {facts.SOUNDS[thing]}."
    elif roll < 0.6:
        thing = r.choice(list(facts.LEGS))
        ask, short, answer = (
            f"How many legs does {thing} have?",
            facts.LEGS[thing],
            f"{cap(thing)} has {facts.LEGS[thing]} legs.",
        )
    elif roll < 0.8:
        a, b = r.choice(facts.OPPOSITES).split(":")
        a, b = (a, b) if r.random() < 0.5 else (b, a)
        ask, short, answer = (
            r.choice((f"What is the opposite of {a}?", f"Opposite of {a}?", f"Tell me the opposite of {a}.")),
            b,
            f"The opposite of {a} is {b}.",
        )
    else:
        table, word = r.choice(((facts.GREETINGS, "hello"), (facts.THANKS, "thank you")))
        tongue = r.choice(list(table))
        ask = r.choice(
            (f"How do you say {word} in {tongue}?", f"What is {word} in {tongue}?", f"Say {word} in {tongue}.")
        )
        short, answer = table[tongue], f"{cap(word)} in {tongue} is {table[tongue]}."
    return rough(ask, r), f"{cap(short)}." if m.short else answer


def counting(m: Memory) -> Exchange:
    n = m.rng.randint(3, 12)
    ask = expand(f"{{count to|count up to|can you count to|please count to}} {{{n}|{NUMBERS[n]}}}.", m.rng)
    return rough(cap(ask), m.rng), ", ".join(cap(w) if i == 0 else w for i, w in enumerate(NUMBERS[1 : n + 1])) + "."


def why(m: Memory) -> Exchange:
    ways, answer = m.rng.choice(facts.WHY)
    return rough(
        expand(f"{{Why|Why|Do you know why|Can you explain why|Tell me why}} {m.rng.choice(ways.split(', '))}?", m.rng),
        m.rng,
    ), answer


def how_to(m: Memory) -> Exchange:
    ways, answer = m.rng.choice(facts.HOWTO)
    way = m.rng.choice(ways.split(", "))
    m.topic, m.more, m.summary = way, [], answer.split(", ")[0].rstrip(".") + "."
    return asked(
        m,
        f"{{how do i|how can i|how to|how do you|what is the best way to|tell me how to|explain how to|can you tell me how to|please tell me how to}} {way}?",
    ), answer


def joke(m: Memory, pool: tuple[str, ...] = facts.JOKES) -> Exchange:
    left = [j for j in pool if j not in m.jokes] or list(pool)
    text = m.rng.choice(left)
    m.jokes.append(text)
    words = (
        "{tell me a joke|do you know a joke|make me laugh|a joke please|joke|say something funny|i want to hear a joke|can you tell me a joke|tell me something funny|cheer me up with a joke|do you know any jokes}"
        if pool is facts.JOKES
        else "{tell me a fun fact|fun fact|tell me something interesting|do you know a fun fact|surprise me|tell me a fact|tell me something i do not know|an interesting fact please}"
    )
    m.again, m.topic, m.more = (lambda again: joke(again, pool)), "", []
    return asked(m, words + "{?|.|}"), text


def any_thing(m: Memory) -> str:
    roll = m.rng.random()
    if roll < 0.5:
        return m.rng.choice(facts.THINGS)
    if roll < 0.8:
        return pseudo_word(m.rng)
    return m.rng.choice(facts.UNKNOWN)


def another(m: Memory) -> Exchange:
    if m.again is None:
        return None
    made = m.again(m)
    return made and (
        asked(
            m,
            "{another one|one more|another|again|tell me another one|another one please|one more please|can you tell me another one|do you have another one|give me another}{?|.|!|}",
        ),
        made[1],
    )


ASK_UNKNOWN = (
    "{what is|what's|what are} X?", "{tell me about|tell me something about|explain|describe|talk about|define} X.", "{do you know|have you heard of} X?", "{what do you know about|what do you think about|what can you tell me about} X?",
    "{who is|who was|who were} X?", "{when was|where is|how old is|how big is|how does|how do} X{ work|}?", "{how do i|how can i|how to} {use|build|fix|cook|play|buy|get} X?", "{why is|why are|why do people like|why was} X {so important|famous|expensive|}?",
    "{i want to learn about|i am interested in|let us talk about|can you teach me about} X.", "{who invented|who discovered|what happened to|what is the history of|what is the best|where does} X{ come from|}?", "Can you {explain|tell me about|describe} X?", "X?",
)  # fmt: skip


def unknown(m: Memory) -> Exchange:
    roll = m.rng.random()
    if roll < 0.45:
        topic = m.rng.choice(facts.UNKNOWN)
    elif roll < 0.8:
        topic = " ".join(pseudo_word(m.rng) for _ in range(m.rng.choice((1, 1, 2))))
        topic = topic.title() if m.rng.random() < 0.5 else topic
    elif roll < 0.9:
        topic = f"{m.rng.choice(facts.NAMES)} {cap(pseudo_word(m.rng))}"
    else:
        topic = f"{m.rng.choice(('the old', 'the great', 'the new', 'the secret', 'modern', 'ancient', 'wild'))} {any_thing(m)}"
    m.topic, m.more, m.summary, m.again = topic, [], f"I do not know about {topic}.", None
    ask = rough(cap(expand(m.rng.choice(ASK_UNKNOWN).replace("X", topic), m.rng)), m.rng, keep_words=True)
    if m.rng.random() < 0.25:
        ask, topic = ask.lower(), topic.lower()
    return (
        ask,
        f"I do not know about {topic}."
        if m.short
        else f"I am only a small demo model, and I do not know about {topic}.",
    )


def give_name(m: Memory) -> Exchange:
    name = m.rng.choice(facts.NAMES) if m.rng.random() < 0.6 else cap(pseudo_word(m.rng))
    m.name = name
    ask = expand(
        f"{{my name is|i am|i'm|call me|you can call me|hello, my name is|hi, i am|hi i'm|people call me|hello, i am|my name's|by the way, my name is}} {name}{{.|!|}}",
        m.rng,
    )
    ask = cap(ask.replace(" i ", " I ").replace(" i'm", " I'm"))
    if m.rng.random() < 0.2:
        ask, m.name = ask.lower(), name.lower()
        m.name = cap(m.name)
    return ask, f"Hello, {m.name}!" if m.short else f"Nice to meet you, {m.name}! How can I help you?"


def ask_name(m: Memory) -> Exchange:
    ask = asked(
        m,
        "{what is my name|what's my name|do you know my name|do you remember my name|who am i|what did i say my name is|can you tell me my name|tell me my name|say my name|how am i called|what am i called}?",
    )
    if not m.name:
        return ask, "You have not told me your name."
    return ask, f"{m.name}." if m.short else f"Your name is {m.name}."


def favourite(m: Memory) -> Exchange:
    kind, words = m.rng.choice(
        (
            ("colour", facts.COLOUR_NAMES),
            ("food", facts.FOODS),
            ("animal", facts.THINGS[:6]),
            ("hobby", facts.HOBBIES),
            ("city", facts.CITIES),
            ("word", ["?"]),
            ("number", ["#"]),
        )
    )
    value = m.rng.choice(words).replace("_", " ")
    value = pseudo_word(m.rng) if value == "?" else str(m.rng.randint(1, 99)) if value == "#" else value
    m.told[f"favourite {kind}"] = value
    spelled = m.rng.choice(("favourite", "favorite"))
    ask = expand(f"{{my {spelled} {kind} is {value}|{value} is my {spelled} {kind}}}{{.|!|}}", m.rng)
    return cap(ask), "Noted." if m.short else f"Good to know: your favourite {kind} is {value}."


def possession(m: Memory) -> Exchange:
    kind = m.rng.choice(("dog", "cat", "sister", "brother", "friend", "son", "daughter", "boss", "horse", "rabbit"))
    name = m.rng.choice(facts.NAMES) if m.rng.random() < 0.5 else cap(pseudo_word(m.rng))
    m.told[f"the name of your {kind}"] = name
    return expand(
        f"{{I have a {kind} called {name}|My {kind} is called {name}|My {kind}'s name is {name}|The name of my {kind} is {name}}}{{.|}}",
        m.rng,
    ), f"{name} is a nice name for a {kind}."


def home(m: Memory) -> Exchange:
    place = m.rng.choice(facts.CITIES) if m.rng.random() < 0.6 else cap(pseudo_word(m.rng))
    kind, verb = m.rng.choice((("live", "live in"), ("work", "work in")))
    m.told[kind] = place
    return expand(f"{{I {verb} {place}}}{{.|}}", m.rng), f"{place} sounds nice. What do you like about it?"


def recall(m: Memory) -> Exchange:
    if not m.told:
        return None
    kind, value = m.rng.choice(list(m.told.items()))
    if kind in {"live", "work"}:
        ask, answer = (
            expand(f"{{Where do I {kind}|Do you know where I {kind}|In which city do I {kind}}}?", m.rng),
            f"You {kind} in {value}.",
        )
    elif kind.startswith("favourite"):
        spelled = kind.replace("favourite", m.rng.choice(("favourite", "favorite")))
        ask, answer = (
            expand(
                f"{{What is my {spelled}|What's my {spelled}|Do you remember my {spelled}|Which is my {spelled}}}?",
                m.rng,
            ),
            f"Your {kind} is {value}.",
        )
    else:
        thing = kind.removeprefix("the name of your ")
        ask, answer = (
            expand(
                f"{{What is my {thing} called|What is the name of my {thing}|What is my {thing}'s name|Who is my {thing}}}?",
                m.rng,
            ),
            f"Your {thing} is called {value}.",
        )
    return rough(ask, m.rng), f"{cap(value)}." if m.short else answer


def recall_missing(m: Memory) -> Exchange:
    kind = m.rng.choice(
        ("favourite colour", "favourite food", "favourite animal", "favourite city", "favourite number")
    )
    if kind in m.told:
        return None
    return rough(f"What is my {kind}?", m.rng), f"You have not told me your {kind}."


def in_context(m: Memory) -> Exchange:
    """A fact and a question about it in one message: reading, not knowing."""
    who, thing = (
        m.rng.choice((m.rng.choice(facts.NAMES), cap(pseudo_word(m.rng)))),
        m.rng.choice((m.rng.choice(facts.FOODS).replace("_", " "), pseudo_word(m.rng))),
    )
    place, number = m.rng.choice((m.rng.choice(facts.CITIES), cap(pseudo_word(m.rng)))), m.rng.randint(2, 60)
    many = thing.rstrip("s") + "s"
    fact, ask, answer = m.rng.choice((
        (f"{who} likes {thing}.", f"What does {who} like?", f"{who} likes {thing}."),
        (f"{who} lives in {place}.", f"Where does {who} live?", f"{who} lives in {place}."),
        (f"The secret word is {thing}.", "What is the secret word?", f"The secret word is {thing}."),
        (f"{who} has {number} {many}.", f"How many {many} does {who} have?", f"{who} has {number} {many}."),
        (f"The meeting is in {place}.", "Where is the meeting?", f"The meeting is in {place}."),
        (f"The meeting is on {(day := m.rng.choice(facts.DAYS))}.", "When is the meeting?", f"The meeting is on {day}."),
    ))  # fmt: skip
    if m.rng.random() < 0.3:
        other = m.rng.choice(
            (
                f"{cap(pseudo_word(m.rng))} is far away.",
                "It was a sunny day.",
                f"{m.rng.choice(facts.NAMES)} was there too.",
            )
        )
        fact = f"{fact} {other}" if m.rng.random() < 0.5 else f"{other} {fact}"
    return f"{fact} {ask}", answer


def echo(m: Memory) -> Exchange:
    words = m.rng.choice(
        (
            m.rng.choice(facts.NAMES),
            pseudo_word(m.rng),
            f"{m.rng.choice(facts.COLOUR_NAMES)} {any_thing(m)}",
            " ".join(pseudo_word(m.rng) for _ in range(m.rng.randint(2, 5))),
            m.rng.choice(("hello world", "I like cloister", "one two three", "good night moon")),
        )
    )
    return expand(
        "{say|repeat|repeat after me:|say the word|please say|say this:|please repeat:|write|write down|just say|only say}",
        m.rng,
    ).capitalize() + f" {words}", words


def repeat(m: Memory) -> Exchange:
    if not m.answers or len(m.answers[-1]) > 160:
        return None
    return asked(
        m,
        "{say that again|repeat that|can you repeat that|what did you say|please repeat your answer|once more please|pardon, what did you say}{?|.|}",
    ), m.answers[-1]


def asked_what(m: Memory) -> Exchange:
    if not m.asked:
        return None
    first = m.rng.random() < 0.5
    which = m.asked[0] if first else m.asked[-1]
    if len(which) > 90 or m.manner:
        return None
    word = "{first|at the beginning}" if first else "{just now|before|last}"
    return asked(
        m, f"{{what did i {{ask|say}} {word}|what was my {'first' if first else 'last'} {{question|message}}}}?"
    ), f'You wrote: "{which}"'


def statement(m: Memory) -> Exchange:
    r, roll = m.rng, m.rng.random()
    thing = r.choice((r.choice(facts.FOODS).replace("_", " "), r.choice(facts.HOBBIES), pseudo_word(r)))
    if roll < 0.4:
        return rough(
            cap(expand(f"{{i like|i love|i really like|i enjoy}} {thing}.", r)).replace("I ", "I "), r, keep_words=True
        ), "Nice." if m.short else f"{cap(thing)}, that sounds nice! What do you like about it?"
    if roll < 0.6:
        return rough(
            cap(expand(f"{{i do not like|i don't like|i hate}} {thing}.", r)), r, keep_words=True
        ), "I see." if m.short else f"I see, {thing} is not for everybody."
    if roll < 0.85:
        return rough(
            cap(expand(f"{{do you like|what do you think of|do you enjoy|do you love}} {thing}?", r)),
            r,
            keep_words=True,
        ), "I am a program." if m.short else f"I am a program, so I have no taste, but many people may like {thing}."
    return rough(
        cap(
            expand(f"{{i am going to|i will visit|i was in|i am from|i'm from}} {(city := r.choice(facts.CITIES))}.", r)
        ),
        r,
        keep_words=True,
    ), f"{city} sounds nice. Have a good time!"
