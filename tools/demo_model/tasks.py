"""Exchanges that do something with words, numbers and short texts; each answer is computed from the question.

One function per kind of task, as in ``exchanges``: (question, true answer) or nothing.
"""

from __future__ import annotations

import json

import facts
import product
import tales
import words
from exchanges import NUMBERS, Exchange, Memory, cap
from grammar import expand, pseudo_word, rough

BULLETS = "- "


def said(m: Memory, template: str, *, exact: bool = True) -> str:
    """A question whose words are needed for the answer: never mistyped unless ``exact`` is off."""
    return rough(cap(expand(template, m.rng)), m.rng, keep_words=exact)


def name(m: Memory) -> str:
    return m.rng.choice(facts.NAMES) if m.rng.random() < 0.7 else cap(pseudo_word(m.rng))


def joined(items: list[str], last: str = "and") -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def plural(kind: str) -> str:
    return words.MANY.get(kind, f"{kind}s")


def some_words(m: Memory, least: int = 3, most: int = 5) -> list[str]:
    """Different words, mostly of one kind."""
    pool = m.rng.choice((words.THINGS, words.KINDS["animal"], words.KINDS["fruit"], words.KINDS["vegetable"], facts.NAMES, words.KINDS["city"]))  # fmt: skip
    return m.rng.sample(pool, m.rng.randint(least, most))


def sums(m: Memory) -> Exchange:
    r, roll = m.rng, m.rng.random()
    if roll < 0.3:
        a, b = r.randint(0, 50), r.randint(0, 50)
        sign, word, value = r.choice(("+", "plus")), "plus", a + b
    elif roll < 0.55:
        b, value = r.randint(0, 50), r.randint(0, 50)
        a, sign, word = b + value, r.choice(("-", "minus")), "minus"
    elif roll < 0.85:
        a, b = r.randint(0, 12), r.randint(0, 12)
        sign, word, value = r.choice(("*", "times", "x")), "times", a * b
    else:
        b, value = r.randint(1, 10), r.randint(0, 10)
        a, sign, word = b * value, r.choice(("/", "divided by")), "divided by"
    ask = f"{{what is|what's|how much is|calculate|compute|can you tell me what is|and what is|now|and|}} {a} {sign} {b}{{?|}}"
    m.result = (len(m.answers), value)
    return said(m, ask), f"{value}." if m.short else f"{a} {word} {b} is {value}."


def go_on_counting(m: Memory) -> Exchange:
    """Computes on with the last result."""
    at, n = m.result
    if not m.answers or at != len(m.answers) - 1 or n > 60:
        return None
    by = m.rng.randint(1, 12)
    ask, word, value = m.rng.choice((("{and|now|then} {plus|add} B{| to it| to that}", "plus", n + by), ("{double it|and double that|times two|twice that}", "times", 2 * n), ("{and|now|then} {minus|take away} B", "minus", n - by)))  # fmt: skip
    if value < 0:
        return None
    by = 2 if word == "times" else by
    m.result = (len(m.answers), value)
    return said(m, ask.replace("B", str(by)) + "{?|.|}"), f"{value}." if m.short else f"{n} {word} {by} is {value}."


def about_number(m: Memory) -> Exchange:
    r, n = m.rng, m.rng.randint(0, 60)
    kind = r.randrange(7)
    if kind == 0:
        return said(m, f"{{is {n} even or odd|is {n} an even number or an odd number}}?"), f"{n} is {'odd' if n % 2 else 'even'}."  # fmt: skip
    if kind == 1:
        return said(m, f"{{which|what}} number comes after {n}?"), f"{n + 1} comes after {n}."
    if kind == 2 and n:
        return said(m, f"{{which|what}} number comes before {n}?"), f"{n - 1} comes before {n}."
    if kind == 3:
        return said(m, f"{{what is half of|how much is half of}} {2 * n}?"), f"Half of {2 * n} is {n}."
    if kind == 4:
        return said(m, f"{{what is|how much is}} {{twice|double}} {n}?"), f"Twice {n} is {2 * n}."
    if kind == 5:
        start, step = r.randint(0, 12), r.randint(1, 6)
        row = ", ".join(str(start + step * i) for i in range(4))
        return said(m, f"{{continue:|what comes next:|which number comes next?|go on:}} {row}"), f"{start + step * 4}, because each number is {step} more than the one before."  # fmt: skip
    row = r.sample(range(1, 60), r.randint(3, 5))
    big = r.random() < 0.6
    return said(m, f"{{which is the {'largest' if big else 'smallest'}:|what is the {'largest' if big else 'smallest'} number of}} {', '.join(map(str, row))}?"), f"The {'largest' if big else 'smallest'} is {max(row) if big else min(row)}."  # fmt: skip


def word_problem(m: Memory) -> Exchange:
    r, who, other = m.rng, name(m), name(m)
    thing = f"{r.choice(words.THINGS)}s" if r.random() < 0.5 else r.choice(["apples", "pears", "coins", "books", "eggs", "stamps", "marbles"])  # fmt: skip
    thing = {"boxs": "boxes", "brushs": "brushes", "leafs": "leaves", "torchs": "torches", "glasss": "glasses", "breads": "breads"}.get(thing, thing)  # fmt: skip
    a, b = r.randint(2, 20), r.randint(2, 10)
    kind = r.randrange(4)
    if kind == 0:
        return f"{who} has {a} {thing} and {r.choice(('buys', 'finds', 'gets'))} {b} more. How many {thing} does {who} have{r.choice((' now', ''))}?", f"{a} plus {b} is {a + b}, so {who} has {a + b} {thing}."  # fmt: skip
    if kind == 1 and a >= b:
        return f"{who} has {a} {thing} and {r.choice((f'gives {b} to {other}', f'loses {b}', f'sells {b}'))}. How many {thing} {r.choice((f'does {who} have now', 'are left'))}?", f"{a} minus {b} is {a - b}, so {who} has {a - b} {thing}."  # fmt: skip
    if kind == 2:
        c, d = r.randint(2, 9), r.randint(2, 9)
        return f"There are {c} boxes with {d} {thing} in each. How many {thing} are there?", f"{c} times {d} is {c * d}, so there are {c * d} {thing}."  # fmt: skip
    return f"{who} has {a} {thing} and {other} has {b}. How many {thing} do they have together?", f"{a} plus {b} is {a + b}, so they have {a + b} {thing}."  # fmt: skip


UNITS = (("minutes", "hours", 60), ("seconds", "minutes", 60), ("days", "weeks", 7), ("hours", "days", 24), ("months", "years", 12), ("centimetres", "metres", 100), ("metres", "kilometres", 1000), ("grams", "kilograms", 1000), ("eggs", "dozens", 12), ("cents", "euros", 100))  # fmt: skip


def units(m: Memory) -> Exchange:
    small, large, factor = m.rng.choice(UNITS)
    n = m.rng.randint(1, 6)
    of = "one " + large.rstrip("s") if n == 1 else f"{n} {large}"
    if n == 1:
        return said(m, f"How many {small} are in {of}?"), f"There are {factor} {small} in {of}."
    return said(m, f"How many {small} are {{in |}}{of}?"), f"{cap(of)} are {n * factor} {small}."


def letters(m: Memory) -> Exchange:
    r = m.rng
    word = r.choice(r.choice((words.THINGS, words.KINDS["animal"], words.KINDS["fruit"], words.KINDS["colour"])))
    kind = r.randrange(6)
    if kind == 0:
        return said(m, f"{{spell|can you spell|please spell|how do you spell|how is this spelled:}} {word}"), "-".join(word.upper()) + "."  # fmt: skip
    if kind == 1:
        return said(m, f"{{what is the first letter of|with which letter does this begin:|first letter of}} {word}?"), f"The first letter of {word} is {word[0].upper()}."  # fmt: skip
    if kind == 2:
        return said(m, f"{{what is the last letter of|last letter of|with which letter does this end:}} {word}?"), f"The last letter of {word} is {word[-1].upper()}."  # fmt: skip
    if kind == 3:
        return said(m, f"{{how many letters {{are in|has|are there in}}|count the letters in}} {word}?"), f"{cap(word)} has {len(word)} letters: {'-'.join(word.upper())}."  # fmt: skip
    text = " ".join(r.choice((some_words(m, 1, 3), [pseudo_word(r), word])))
    if kind == 4:
        return said(m, f"{{write this in capital letters:|in capitals please:|make this upper case:|uppercase:}} {text}"), text.upper()  # fmt: skip
    return said(m, f"{{write this in small letters:|make this lower case:|lowercase:}} {text.upper()}"), text.lower()


def listing_of(m: Memory) -> Exchange:
    """Things of a kind, in the form that was asked for."""
    r = m.rng
    kind = r.choice([k for k in words.KINDS if k != "TEE"])
    n = r.choice((1, 2, 3, 3, 4, 5, 6))
    few = r.sample(words.KINDS[kind], n)
    many = NUMBERS[n] if r.random() < 0.6 else str(n)
    what = f"{many} {kind if n == 1 else plural(kind)}"
    m.topic, m.more, m.again = "", [], listing_of
    m.summary = ""
    verb = f"{{name|list|give me|tell me|i need|can you name|write down|please list}} {what}"
    roll = r.random()
    if roll < 0.5 or n == 1:
        return said(m, f"{verb}{{.|?|, please.|}}", exact=False), f"{cap(joined(few))}."
    if roll < 0.65:
        return said(m, f"{verb} {{as a list|as bullet points|one on each line|in a bullet list}}."), "\n".join(BULLETS + cap(w) for w in few)  # fmt: skip
    if roll < 0.8:
        return said(m, f"{verb} {{as a numbered list|in a numbered list|, numbered}}."), "\n".join(f"{i}. {cap(w)}" for i, w in enumerate(few, 1))  # fmt: skip
    if roll < 0.93:
        return said(m, f"{verb} {{as JSON|in JSON|as a JSON list|as a JSON array}}."), json.dumps(few)
    return said(m, f"{verb}, separated by commas."), ", ".join(few)


def belongs(m: Memory) -> Exchange:
    r = m.rng
    kind, other = r.sample([k for k in words.KINDS if k not in ("TEE", "animal")], 2)
    word = r.choice(words.KINDS[kind])
    bare = kind in ("country", "city", "planet", "colour", "drink", "metal", "sport")
    it = word if bare else tales.article(word)
    if r.random() < 0.3:
        return said(m, f"{{what kind of thing is|what sort of thing is}} {it}?"), f"{cap(it)} is {tales.article(kind)}."
    if r.random() < 0.5:
        claim = kind if r.random() < 0.5 else other
        return said(m, f"Is {it} {tales.article(claim)}?"), f"{'Yes' if claim == kind else 'No'}, {it} is {tales.article(kind)}."  # fmt: skip
    row = [*r.sample(words.KINDS[kind], 3), r.choice(words.KINDS[other])]
    odd = row[-1]
    r.shuffle(row)
    if odd in words.KINDS[kind]:
        return None
    return said(m, f"{{which one does not belong|which does not fit|find the odd one out}}: {', '.join(row)}?"), f"{cap(odd)} does not belong: the others are {plural(kind)}."  # fmt: skip


def order(m: Memory) -> Exchange:
    r = m.rng
    if r.random() < 0.5:
        row = r.sample(range(1, 60), r.randint(3, 6))
        up = r.random() < 0.65
        way = "{sort|order|put in order|sort these numbers}" if up else "{sort down|sort from large to small|sort in descending order|order from high to low}"  # fmt: skip
        return said(m, f"{way}: {', '.join(map(str, row))}"), ", ".join(map(str, sorted(row, reverse=not up)))
    row = some_words(m, 3, 5)
    kind = r.randrange(4)
    if kind == 0:
        return said(m, f"{{sort by the alphabet|sort alphabetically|put in alphabetical order|sort these words}}: {', '.join(row)}"), ", ".join(sorted(row))  # fmt: skip
    if kind == 1:
        return said(m, f"{{reverse this list|turn this list around|say these backwards}}: {', '.join(row)}"), ", ".join(reversed(row))  # fmt: skip
    if kind == 2:
        i = r.randrange(len(row))
        place = ["first", "second", "third", "fourth", "fifth"][i] if r.random() < 0.8 else "last"
        i = len(row) - 1 if place == "last" else i
        return said(m, f"{{what is|which is|tell me}} the {place} {{word|item|one}} {{of|in}}: {', '.join(row)}?"), f"The {place} one is {row[i]}."  # fmt: skip
    return said(m, f"{{how many {{words|items|things}} are in this list|count these}}: {', '.join(row)}"), f"There are {len(row)}."  # fmt: skip


def rewrite(m: Memory) -> Exchange:
    r = m.rng
    who = r.choice((name(m), f"the {tales.hero(r)}"))
    verb = r.choice(list(words.PAST))
    third = verb + ("es" if verb.endswith(("sh", "ch", "x", "s")) else "s")
    third = verb[:-1] + "ies" if verb == "carry" else third
    thing = f"{r.choice(('the', 'a', 'my'))} {r.choice(words.ADJECTIVES)} {r.choice(words.THINGS)}".replace("a old", "an old").replace("a empty", "an empty")  # fmt: skip
    if verb == "walk":
        thing = f"to the {r.choice(words.PLACES)}"
    now = cap(f"{who} {third} {thing}.")
    kind = r.randrange(6)
    if kind == 0:
        return said(m, f"{{put this into the past|past tense|write this in the past tense|change to past tense}}: {now}"), cap(f"{who} {words.PAST[verb]} {thing}.")  # fmt: skip
    if kind == 1:
        return said(m, f"{{make this a question|turn this into a question}}: {now}"), cap(f"does {who} {verb} {thing}?")
    if kind == 2:
        return said(m, f"{{make this negative|say the opposite|say that this is not so|negate}}: {now}"), cap(f"{who} does not {verb} {thing}.")  # fmt: skip
    if kind == 3:
        bare = r.choice(("give me", "bring me", "send me", "show me")) + f" {thing.replace('my', 'the')}"
        return said(m, f"{{make this polite|say this politely|make it friendlier|rewrite this politely}}: {cap(bare)}{{!|.|}}"), f"Could you please {bare}?"  # fmt: skip
    if kind == 4:
        future = cap(f"{who} will {verb} {thing}.")
        return said(m, f"{{put this into the future|future tense|write this in the future tense}}: {now}"), future
    other = name(m)
    return said(m, f"{{add {other} to this|write this with {other} too}}: {now}"), cap(
        f"{who} and {other} {verb} {thing}."
    )


def grammar_fix(m: Memory) -> Exchange:
    wrong, right = m.rng.choice(words.WRONG)
    return said(m, f"{{correct this|correct|fix the grammar|fix this sentence|what is wrong here|correct my English}}: {wrong}"), right  # fmt: skip


def vocabulary(m: Memory) -> Exchange:
    """Opposites in pairs, words of the same meaning, rhymes, plurals, young animals, homes, stuff, uses, other languages."""
    r = m.rng
    kind = r.randrange(9)
    if kind == 0:
        a, b = r.choice(list(words.SAME.items()))
        return said(m, f"{{what is another word for|what is a synonym of|another word for|give me a word that means the same as}} {a}?"), f"Another word for {a} is {b}."  # fmt: skip
    if kind == 1:
        row = r.choice(words.RHYMES)
        a = r.choice(row)
        return said(m, f"{{what rhymes with|tell me a word that rhymes with|a rhyme for|find a rhyme for}} {a}?"), f"{cap(r.choice([w for w in row if w != a]))} rhymes with {a}."  # fmt: skip
    if kind == 2:
        a, b = r.choice([*words.PLURALS.items(), *((w, w + "s") for w in ("dog", "house", "tree", "book", "lamp"))])
        return said(m, f"{{what is the plural of|plural of|the plural of}} {a}?"), f"The plural of {a} is {b}."
    if kind == 3:
        a, b = r.choice(list(words.YOUNG.items()))
        return said(m, "{what is a young A called|what do you call a baby A|what is the young of a A called}?".replace("A", a).replace("a owl", "an owl")), f"A young {a} is called a {b}.".replace("a owlet", "an owlet")  # fmt: skip
    if kind == 4:
        a, b = r.choice(list(words.HOMES.items()))
        return said(m, f"{{where does {tales.article(a)} live|what is the home of {tales.article(a)}}}?"), f"{cap(tales.article(a))} lives in {'the' if b in ('sea', 'desert', 'cold south') else tales.article(b)[:2].strip()} {b}."  # fmt: skip
    if kind == 5:
        a, b = r.choice(list(words.MADE_OF.items()))
        return said(m, f"{{what is {a} made of|what is {a} made from|from what is {a} made}}?"), f"{cap(a)} {'are' if a == 'raisins' else 'is'} made of {b}."  # fmt: skip
    if kind == 6:
        a, b = r.choice(list(words.USED_FOR.items()))
        many = a in ("scissors", "glasses")
        return said(m, f"{{what {'are' if many else 'is'} {a} used for|what do you do with {a}|what {'are' if many else 'is'} {a} for}}?"), f"{cap(a)} {'are' if many else 'is'} used for {b}."  # fmt: skip
    if kind == 7:
        a, b = r.choice(list(words.PAST.items()))
        return said(m, f"{{what is the past {{tense|form|}} of|past tense of}} {a}?"), f"The past of {a} is {b}."
    tongue = r.choice(list(words.ABROAD))
    a, b = r.choice(list(words.ABROAD[tongue].items()))
    return said(m, f"{{what is {a} in {tongue}|how do you say {a} in {tongue}|what does {a} mean in {tongue}|translate {a} {{to|into}} {tongue}|the {tongue} word for {a}}}?"), f"{cap(a)} in {tongue} is {b}."  # fmt: skip


def as_json(m: Memory) -> Exchange:
    r, who = m.rng, name(m)
    age, city = r.randint(5, 90), r.choice((r.choice(facts.CITIES), cap(pseudo_word(r))))
    job, colour = r.choice(words.KINDS["job"]), r.choice(facts.COLOUR_NAMES)
    have = {
        "name": (who, f"{who}"),
        "age": (age, f"is {age} years old"),
        "city": (city, f"lives in {city}"),
        "job": (job, f"is {tales.article(job)}"),
        "colour": (colour, f"likes {colour}"),
    }
    keys = ["name", *r.sample(["age", "city", "job", "colour"], r.randint(1, 3))]
    text = f"{who} {joined([have[k][1] for k in keys[1:]])}."
    answer = json.dumps({k: have[k][0] for k in keys})
    roll = r.random()
    if roll < 0.5:
        ask = f"{{write this as JSON|turn this into JSON|make JSON of this|extract the data as JSON|as JSON}}: {text}"
        if r.random() < 0.5:
            ask = f"{{extract|give me|find}} {joined(keys)} as JSON: {text}"
        return said(m, ask), answer
    if roll < 0.7:
        plain = {k: have[k][0] for k in keys}
        told = joined([f"{k} {v}" for k, v in plain.items()])
        return said(m, f"{{make|write|give me}} {{a JSON object|JSON|an object in JSON}} with {told}."), answer
    if roll < 0.85:
        country = r.choice(list(facts.CAPITALS))
        return said(m, f"{{what is the capital of {country}? answer as JSON|give me the capital of {country} as JSON|answer in JSON: what is the capital of {country}?}}"), json.dumps({"country": country, "capital": facts.CAPITALS[country]})  # fmt: skip
    key = r.choice(keys)
    return f"{r.choice(('What is', 'Tell me', 'Read'))} the {key} in {answer}", f"The {key} is {have[key][0]}."


def feeling(m: Memory) -> Exchange:
    good = m.rng.random() < 0.5
    thing = m.rng.choice((m.rng.choice(words.THINGS), m.rng.choice(("film", "meal", "hotel", "concert", "journey", "service"))))  # fmt: skip
    text = m.rng.choice(words.GOOD if good else words.BAD).replace("X", thing)
    verdict = "positive" if good else "negative"
    return said(m, f"{{is this positive or negative|what is the sentiment|positive or negative|classify as positive or negative|does this sound happy or unhappy}}: {text}"), f"{cap(verdict)}." if m.short else f"That is {verdict}."  # fmt: skip


def logic(m: Memory) -> Exchange:
    r = m.rng
    a, b, c = r.sample(facts.NAMES, 3)
    if r.random() < 0.5:
        more, most, least = r.choice((("taller", "tallest", "smallest"), ("older", "oldest", "youngest"), ("faster", "fastest", "slowest"), ("richer", "richest", "poorest")))  # fmt: skip
        top = r.random() < 0.6
        lines = [f"{a} is {more} than {b}.", f"{b} is {more} than {c}."]
        r.shuffle(lines)
        return f"{' '.join(lines)} Who is the {most if top else least}?", f"{a if top else c} is the {most if top else least}."  # fmt: skip
    kind, trait = pseudo_word(r), r.choice(words.ADJECTIVES)
    member = cap(pseudo_word(r)) if r.random() < 0.5 else a
    if r.random() < 0.7:
        return f"All {kind}s are {trait}. {member} is a {kind}. Is {member} {trait}?", f"Yes, {member} is {trait}, because all {kind}s are."  # fmt: skip
    return f"No {kind} is {trait}. {member} is a {kind}. Is {member} {trait}?", f"No, {member} is not {trait}, because no {kind} is."  # fmt: skip


EVENTS = (
    ("went to the PLACE and bought A_THING", "bought A_THING at the PLACE", "What did WHO buy?", "WHO bought A_THING."),
    ("lost A_THING in the PLACE", "lost A_THING in the PLACE", "What did WHO lose?", "WHO lost A_THING."),
    ("found A_THING near the PLACE", "found A_THING near the PLACE", "Where did WHO find it?", "WHO found it near the PLACE."),
    ("met FRIEND at the PLACE", "met FRIEND at the PLACE", "Whom did WHO meet?", "WHO met FRIEND."),
    ("gave A_THING to FRIEND", "gave A_THING to FRIEND", "What did WHO give to FRIEND?", "WHO gave A_THING to FRIEND."),
    ("repaired A_THING with FRIEND", "repaired A_THING with FRIEND", "Who helped WHO?", "FRIEND helped WHO."),
)  # fmt: skip
FILLERS = ("The weather was {fine|cold|grey|warm}.", "It was a {long|short|busy} day.", "There were many people.", "The bus was {late|full}.", "A dog barked somewhere.", "It smelled of {coffee|rain|bread}.", "The clock struck {two|four|nine}.")  # fmt: skip


def reading(m: Memory) -> Exchange:
    """A short text, to be summarised, given a title, or asked about."""
    r, who, friend = m.rng, name(m), name(m)
    thing, place, day = f"a {r.choice(words.ADJECTIVES)} {r.choice(words.THINGS)}".replace("a old", "an old").replace("a empty", "an empty"), r.choice(words.PLACES), r.choice(facts.DAYS)  # fmt: skip
    event, core, question, answer = (t.replace("WHO", who).replace("FRIEND", friend).replace("A_THING", thing).replace("PLACE", place) for t in r.choice(EVENTS))  # fmt: skip
    fillers = [expand(f, r) for f in r.sample(FILLERS, r.randint(1, 3))]
    sentences = [f"On {day} {who} {event}.", *fillers]
    if r.random() < 0.4:
        sentences = [*fillers[:1], sentences[0], *fillers[1:]]
    text = " ".join(sentences)
    kind = r.randrange(5)
    if kind <= 1:
        ask = f"{{summarise this|summarize|summary please|sum this up|what is this about|in one sentence|shorten this|tl;dr}}: {text}"  # fmt: skip
        return said(m, ask), f"On {day} {who} {core}."
    if kind == 2:
        return said(
            m, f"{{who is this about|who is the main person|about whom is this text}}? {text}"
        ), f"It is about {who}."
    if kind == 3:
        return said(m, f"{{on which day was that|when did it happen|which day was it}}? {text}"), f"It was on {day}."
    return f"{text} {question}", answer


def remember(m: Memory) -> Exchange:
    """Something to keep in mind, or the question about it."""
    r = m.rng
    if m.kept and r.random() < 0.6:
        kind, value = r.choice(list(m.kept.items()))
        ask = f"{{what was the {kind}|which {kind} did i tell you|do you remember the {kind}|tell me the {kind}|what is the {kind} that i told you}}?"  # fmt: skip
        return said(m, ask, exact=False), f"{cap(value)}." if m.short else f"The {kind} is {value}."
    kind = r.choice(("number", "word", "code word", "colour", "room", "meeting day", "train"))
    if kind not in m.kept and r.random() < 0.12:
        return said(
            m, f"{{what was|do you remember|tell me}} the {kind}?", exact=False
        ), f"You have not told me a {kind}."
    value = {"number": str(r.randint(2, 99)), "word": pseudo_word(r), "code word": r.choice((pseudo_word(r), r.choice(words.THINGS))), "colour": r.choice(facts.COLOUR_NAMES), "room": str(r.randint(1, 60)), "meeting day": r.choice(facts.DAYS), "train": str(r.randint(10, 99))}[kind]  # fmt: skip
    m.kept[kind] = value
    ask = f"{{remember the {kind} {value}|please remember: the {kind} is {value}|keep in mind that the {kind} is {value}|the {kind} is {value}, remember that}}{{.|}}"  # fmt: skip
    return said(m, ask), "Noted." if m.short else f"I will keep it in mind: the {kind} is {value}."


def shopping(m: Memory) -> Exchange:
    """A list that grows and shrinks in the conversation."""
    r = m.rng
    goods = ["milk", "bread", "eggs", "butter", "rice", "tea", "salt", "apples", "cheese", "soap", "sugar", "honey", "flour", "tomatoes", "coffee", "beans"]  # fmt: skip
    left = [g for g in goods if g not in m.basket]
    roll = r.random()
    if not m.basket and roll < 0.1:
        return said(
            m, "{what is on my list|what's on my shopping list|show my list}?", exact=False
        ), "Your list is empty."
    if m.basket and roll < 0.35:
        ask = "{what is on my list|what's on my {shopping|} list|show my list|read my list|what do i have to buy|tell me my list}?"  # fmt: skip
        return said(m, ask, exact=False), f"On your list: {joined(m.basket)}."
    if m.basket and roll < 0.5:
        gone = r.choice(m.basket)
        m.basket = [g for g in m.basket if g != gone]
        rest = f"On your list: {joined(m.basket)}." if m.basket else "Your list is empty."
        return said(m, f"{{remove|take|delete}} {gone} {{from|off}} {{my|the}} list."), rest  # fmt: skip
    if not left:
        return None
    new = r.sample(left, min(len(left), r.choice((1, 1, 2, 3))))
    m.basket = [*m.basket, *new]
    return said(m, f"{{add|put|please add|also add}} {joined(new)} {{to|on}} my {{shopping|}} list.", exact=False), f"On your list: {joined(m.basket)}."  # fmt: skip


def quiz(m: Memory) -> Exchange:
    """The model asks; the next exchange answers."""
    r = m.rng
    if m.open_question:
        question, right = m.open_question
        m.open_question = None
        knows = r.random() < 0.6
        pool = list(facts.CAPITALS.values()) if right in facts.CAPITALS.values() else [w for _, w in words.RIDDLES]
        guess = right if knows else r.choice(pool)
        if right.isdigit():
            guess = right if knows else str(int(right) + r.choice((-2, -1, 1, 2)))
        if r.random() < 0.15:
            return said(m, "{i do not know|no idea|tell me|i give up|what is it}{.|?|}"), f"The answer is {right}."
        good = guess == right
        return said(m, f"{{|is it |it is |i think it is |maybe }}{guess}{{.|?|}}"), f"Yes, that is right: {right}." if good else f"No, the answer is {right}."  # fmt: skip
    kind = r.randrange(3)
    if kind == 0:
        country = r.choice(list(facts.CAPITALS))
        question, right = f"What is the capital of {country}?", facts.CAPITALS[country]
    elif kind == 1:
        a, b = r.randint(1, 12), r.randint(1, 12)
        question, right = f"What is {a} plus {b}?", str(a + b)
    else:
        question, right = r.choice(words.RIDDLES)
    m.open_question = (question, right)
    ask = "{tell me a riddle|do you know a riddle|a riddle please|give me a riddle}" if kind == 2 else "{ask me a question|quiz me|ask me something|let us play a quiz|test me|another question please}"  # fmt: skip
    return said(m, ask + "{.|!|}", exact=False), question


def riddle_answer(m: Memory) -> Exchange:
    question, right = m.rng.choice(words.RIDDLES)
    return said(m, question, exact=False), f"{cap(right)}."


def proverb(m: Memory) -> Exchange:
    m.again = proverb
    return said(m, "{tell me a proverb|do you know a proverb|a proverb please|give me a wise saying|tell me something wise|a quote please|say something wise}{.|?|}", exact=False), m.rng.choice(words.PROVERBS)  # fmt: skip


def idea(m: Memory) -> Exchange:
    what = m.rng.choice(list(words.IDEAS))
    m.again = lambda again: idea_for(again, what)
    return idea_for(m, what)


def idea_for(m: Memory, what: str) -> Exchange:
    choice = expand(words.IDEAS[what], m.rng)
    return said(m, f"{{give me an idea for|i need an idea for|do you have an idea for|what about|suggest something for|any ideas for}} {what}{{?|.|}}", exact=False), f"{cap(choice)}." if m.short else f"How about {choice}?"  # fmt: skip


def naming(m: Memory) -> Exchange:
    what = m.rng.choice(("cat", "dog", "robot", "boat", "horse", "rabbit", "parrot", "goldfish"))
    m.again = naming
    return said(m, f"{{give me|suggest|i need|think of}} a name for {{my|a}} {what}{{.|}}", exact=False), f"How about {m.rng.choice(facts.NAMES)}?"  # fmt: skip


def note(m: Memory) -> Exchange:
    r, who = m.rng, name(m)
    thing, day = r.choice(words.THINGS), r.choice(facts.DAYS)
    kind = r.randrange(4)
    m.again = None
    if kind == 0:
        return said(m, f"{{write|please write}} a {{short|}} {{thank-you note|letter of thanks}} to {who} for the {thing}."), f"Dear {who},\n{expand('{thank you very much for|many thanks for|how kind of you to give me}', r).capitalize()} the {thing}. {expand('{It is just right.|I like it very much.|It made me happy.}', r)}\n{expand('{Best wishes|With kind regards|Yours}', r)}"  # fmt: skip
    if kind == 1:
        return said(m, f"{{write|please write}} an invitation {{for|to}} {who} to a party on {day}."), f"Dear {who},\nplease come to my party on {day}. There will be {expand('{music and cake|games and good food|tea and friends}', r)}.\n{expand('{See you soon|I hope that you can come|Best wishes}', r)}"  # fmt: skip
    if kind == 2:
        return said(m, f"{{write|please write}} a birthday {{wish|card}} for {who}."), f"Dear {who},\nhappy birthday! I wish you {expand('{a wonderful year|health and joy|a day full of good things}', r)}.\n{expand('{Best wishes|Yours}', r)}"  # fmt: skip
    return said(m, f"{{write|please write}} a short {{mail|message|email}} to {who}: I am ill and cannot come on {day}."), f"Dear {who},\nI am sorry, but I am ill and cannot come on {day}.\nBest wishes"  # fmt: skip


def either(m: Memory) -> Exchange:
    r = m.rng
    a, b = r.sample(words.KINDS[r.choice(("drink", "fruit", "animal", "sport", "city", "colour", "instrument"))], 2)
    return said(m, f"{{{a} or {b}|do you like {a} or {b}|what is better, {a} or {b}|which do you prefer, {a} or {b}}}?"), "I am a program." if m.short else f"I am a program and have no taste, but both {a} and {b} have their friends."  # fmt: skip


def long_story(m: Memory) -> Exchange:
    r = m.rng
    who = tales.hero(r)
    called = name(m) if r.random() < 0.35 else ""
    place = r.choice(words.PLACES) if r.random() < 0.25 else ""
    text, short = tales.tale(r, who, called, place)
    about = f"about {tales.article(who)}{' called ' + called if called else ''}{f' near the {place}' if place else ''}"
    if not called and not place and r.random() < 0.3:
        about = ""
    ask = f"{{tell me a {{long|nice|good|new|}} story|write a {{longer|long|little|}} story|make up a story|i want to hear a story|tell a story|can you tell me a story}} {about}{{ please|}}{{?|.|}}"  # fmt: skip
    m.again, m.topic, m.summary = long_story, who, cap(short)
    m.more = [tales.more_of_it(r, who)]
    return said(m, ask), text


def long_poem(m: Memory) -> Exchange:
    topic = m.rng.choice(tales.POEM_TOPICS)
    ask = f"{{write {{me|}} a {{short|}} poem|a poem|make a poem|i want a poem|can you write a poem|a rhyme}} about {{the|a}} {topic}{{ please|}}{{?|.|}}"  # fmt: skip
    m.again, m.topic, m.more, m.summary = long_poem, "", [], f"It is a poem about the {topic}."
    return said(m, ask), tales.rhyme(m.rng, topic)


def command(m: Memory) -> Exchange:
    """What a command of cloister does, or which one to use."""
    r = m.rng
    if r.random() < 0.5:
        which = r.choice(list(product.COMMANDS))
        does, example = product.COMMANDS[which]
        m.topic, m.summary = f"cloister {which}", f"cloister {which} {does}."
        m.more = [f"For example: {example}"]
        if r.random() < 0.3:
            ask = f"{{how do i use cloister {which}|give me an example of cloister {which}|show me cloister {which}}}?"
            return said(m, ask, exact=False), f"For example: {example}"
        ask = f"{{what does cloister {which} do|what is cloister {which} for|explain cloister {which}|what is the command cloister {which}|cloister {which}}}?"  # fmt: skip
        return said(m, ask, exact=False), f"cloister {which} {does}."
    which, ways = r.choice(product.TASKS)
    way = r.choice(ways.split(", "))
    example = product.COMMANDS[which][1]
    m.topic, m.more = f"cloister {which}", [f"cloister {which} {product.COMMANDS[which][0]}."]
    m.summary = f"use cloister {which}."
    return said(m, f"{{how do i|how can i|which command do i need to|what is the command to|i want to}} {way}{{?|}}", exact=False), f"Use cloister {which}." if m.short else f"Use cloister {which}, for example: {example}"  # fmt: skip


def all_commands(m: Memory) -> Exchange:
    few = m.rng.sample(list(product.COMMANDS), 4)
    return said(m, "{which commands {are there|does cloister have}|what commands can i use|list some commands of cloister|name some commands}{?|.}", exact=False), f"Some of them: {joined([f'cloister {c}' for c in few])}. Type cloister --help to see all."  # fmt: skip


TABLE = (
    (7, sums), (3, go_on_counting), (3, about_number), (4, word_problem), (1.5, units), (3, letters), (5, listing_of), (3, belongs), (4, order), (3.5, rewrite), (1, grammar_fix), (5, vocabulary), (5, as_json), (2, feeling), (2.5, logic),
    (5, reading), (5, remember), (4, shopping), (4, quiz), (0.7, riddle_answer), (0.7, proverb), (1.5, idea), (0.7, naming), (1.5, note), (0.8, either), (5, long_story), (2, long_poem), (4, command), (0.5, all_commands),
)  # fmt: skip
COPYING = (
    (3, order),
    (2, rewrite),
    (5, as_json),
    (3, logic),
    (5, reading),
    (7, remember),
    (6, shopping),
    (3, quiz),
    (2, letters),
    (2, go_on_counting),
    (2, sums),
)
