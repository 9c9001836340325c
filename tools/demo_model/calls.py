"""Conversations in which the model may call functions, written as Hermes and Qwen write them.

``offer`` is what the chat template in ``export`` makes of a list of tools; ``check`` compares the two.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import facts
import words
from exchanges import Memory, cap
from grammar import expand, pseudo_word, rough

Turn = tuple[str, str]
BEFORE = "Tools:\n<tools>"
AFTER = '\n</tools>\nTo call one, answer with:\n<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>'


@dataclass(frozen=True, slots=True)
class Use:
    """A tool and one way to need it: ``ask`` leads to ``arguments``; then ``result`` comes back and ``answer`` is said."""

    schema: dict[str, Any]
    ask: str
    arguments: dict[str, Any]
    result: str
    answer: str
    vague: str = ""
    missing: str = ""
    given: str = ""


def offer(told: str, tools: list[dict[str, Any]]) -> str:
    """The system message with these tools."""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (f"{told}\n\n" if told else "") + BEFORE + lines + AFTER


def call_text(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


def schema(rng: random.Random, names: str, about: str, **parameters: tuple[str, str]) -> dict[str, Any]:
    """``names``: alternatives for the function's; ``parameters``: type and description of each."""
    explained = rng.random() < 0.5
    properties = {
        key: {"type": kind, **({"description": text} if explained else {})} for key, (kind, text) in parameters.items()
    }
    extra = {"additionalProperties": False} if rng.random() < 0.2 else {}
    return {
        "name": rng.choice(names.split("|")),
        "description": about if rng.random() < 0.85 else "",
        "parameters": {"type": "object", "properties": properties, "required": list(parameters), **extra},
    }


def city(rng: random.Random) -> str:
    return rng.choice(rng.choice((facts.CITIES, words.KINDS["city"]))) if rng.random() < 0.7 else cap(pseudo_word(rng))


def weather(rng: random.Random) -> Use:
    key, where = rng.choice(("city", "city", "place", "location", "town")), city(rng)
    sky, warm = rng.choice(("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")), rng.randint(-9, 32)
    tool = schema(rng, "get_weather|weather|current_weather|weather_in|get_current_weather|forecast", "Get the weather of a city.", **{key: ("string", f"The {key}")})  # fmt: skip
    ask = f"{{what is the weather {{like|}} in|how is the weather in|what's the weather in|is it warm in|will it rain in|tell me the weather in|weather in}} {where}{{ today| now|}}?"
    result = json.dumps(rng.choice(({"sky": sky, "degrees": warm}, {"weather": sky, "temperature": warm}, {"temperature": warm, "conditions": sky})))  # fmt: skip
    if rng.random() < 0.25:
        return Use(tool, ask, {key: where}, f"{sky}, {warm} degrees", f"In {where} it is {sky}, with {warm} degrees.")
    return Use(tool, ask, {key: where}, result, f"In {where} it is {sky}, with {warm} degrees.", "{what is the weather|how is the weather|what's the weather like}?", "For which city?", where)  # fmt: skip


def clock(rng: random.Random) -> Use:
    time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    if rng.random() < 0.5:
        tool = schema(rng, "clock|get_time|current_time|now", "Tell the time.")
        return Use(tool, "{what time is it|what's the time|how late is it|tell me the time}{ now|}?", {}, rng.choice((time, json.dumps({"time": time}))), f"It is {time}.")  # fmt: skip
    key, where = rng.choice(("city", "place", "zone")), city(rng)
    tool = schema(rng, "clock|get_time|time_in|world_clock", "Tell the time in a place.", **{key: ("string", "Where")})
    return Use(tool, f"{{what time is it in|what's the time in|how late is it in}} {where}?", {key: where}, json.dumps({"time": time}), f"In {where} it is {time}.", "what time is it?", "In which place?", where)  # fmt: skip


def calculator(rng: random.Random) -> Use:
    a, b = rng.randint(2, 999), rng.randint(2, 99)
    sign, word, value = rng.choice((("+", "plus", a + b), ("-", "minus", a - b), ("*", "times", a * b)))
    if rng.random() < 0.5:
        key = rng.choice(("expression", "formula", "sum"))
        tool = schema(rng, "calculate|calculator|compute|evaluate", "Compute an expression.", **{key: ("string", "What to compute")})  # fmt: skip
        arguments: dict[str, Any] = {key: f"{a} {sign} {b}"}
    else:
        verb = {"+": "add", "-": "subtract", "*": "multiply"}[sign]
        tool = schema(rng, verb, f"{cap(verb)} two numbers.", a=("integer", "First number"), b=("integer", "Second number"))  # fmt: skip
        arguments = {"a": a, "b": b}
    return Use(tool, f"{{what is|how much is|calculate|compute}} {a} {rng.choice((sign, word))} {b}?", arguments, rng.choice((str(value), json.dumps({"result": value}))), f"{a} {word} {b} is {value}.")  # fmt: skip


def search(rng: random.Random) -> Use:
    key = rng.choice(("query", "text", "q", "topic"))
    topic = rng.choice((rng.choice(facts.UNKNOWN), pseudo_word(rng)))
    found = expand("{a kind of game|an old town|a small animal|a famous song|a green stone|a way to cook rice|a book for children}", rng)  # fmt: skip
    tool = schema(rng, "search|web_search|look_up|find_text", "Search for something.", **{key: ("string", "What to look for")})  # fmt: skip
    return Use(tool, f"{{search for|look up|find something about|what is|search the web for}} {topic}{{.|?|}}", {key: topic}, json.dumps({"result": f"{topic} is {found}"}), f"I found this: {topic} is {found}.", "{search something|look something up}.", "What shall I search for?", topic)  # fmt: skip


def mail(rng: random.Random) -> Use:
    who, text = rng.choice(facts.NAMES), rng.choice(("I am late", "see you soon", "thank you", "the meeting is over", "I am at home", "please call me", "lunch is ready"))  # fmt: skip
    to, body = rng.choice((("to", "text"), ("recipient", "message"), ("name", "body")))
    tool = schema(rng, "send_message|send_mail|send_email|write_message", "Send a message to somebody.", **{to: ("string", "Who gets it"), body: ("string", "What to say")})  # fmt: skip
    return Use(tool, f"{{tell {who}: {text}|send {who} the message: {text}|write to {who}: {text}|send a message to {who}: {text}}}", {to: who, body: text}, rng.choice(('{"sent": true}', "sent", '{"status": "ok"}')), f"I have sent it to {who}.")  # fmt: skip


def reminder(rng: random.Random) -> Use:
    what, minutes = rng.choice(("drink water", "call home", "feed the cat", "open the window", "take the bread out", "stand up")), rng.choice((5, 10, 15, 20, 30, 45, 60))  # fmt: skip
    first, second = rng.choice((("text", "minutes"), ("task", "in_minutes"), ("what", "minutes")))
    tool = schema(rng, "set_reminder|remind|reminder|add_reminder", "Remind the user of something.", **{first: ("string", "Of what"), second: ("integer", "In how many minutes")})  # fmt: skip
    return Use(tool, f"{{remind me in {minutes} minutes to {what}|remind me to {what} in {minutes} minutes}}{{.|}}", {first: what, second: minutes}, rng.choice(('{"ok": true}', "ok", '{"set": true}')), f"I will remind you in {minutes} minutes to {what}.")  # fmt: skip


def convert(rng: random.Random) -> Use:
    n, unit, other = rng.randint(1, 99), *rng.choice((("euros", "dollars"), ("miles", "kilometres"), ("pounds", "kilograms"), ("dollars", "yen"), ("feet", "metres")))  # fmt: skip
    value = round(n * rng.choice((0.3, 0.45, 1.1, 1.6, 150)), 1)
    tool = schema(rng, "convert|convert_units|exchange", "Convert an amount from one unit to another.", amount=("number", "How much"), source=("string", "From which unit"), target=("string", "To which unit"))  # fmt: skip
    return Use(tool, f"{{how many {other} are {n} {unit}|convert {n} {unit} {{to|into}} {other}|what is {n} {unit} in {other}}}?", {"amount": n, "source": unit, "target": other}, json.dumps({"value": value}), f"{n} {unit} are {value} {other}.")  # fmt: skip


def anything(rng: random.Random) -> Use:
    """A tool that exists nowhere else: its schema has to be read."""
    verb, noun = rng.choice(["find", "open", "start", "stop", "delete", "rename", "book", "order", "play", "show", "count", "close", "lock", "print"]), rng.choice(("song", "file", "room", "ticket", "lamp", "report", "door", "app", "enclave", "printer", "table", "picture", "note", "train"))  # fmt: skip
    key = rng.choice((noun, "name", "id", "title", "which"))
    value = rng.choice((pseudo_word(rng), rng.choice(words.ADJECTIVES), str(rng.randint(2, 99)), cap(pseudo_word(rng))))
    tool = schema(rng, rng.choice((f"{verb}_{noun}", f"{verb}{cap(noun)}", f"{noun}_{verb}")), f"{cap(verb)} a {noun}.", **{key: ("string", f"Which {noun}")})  # fmt: skip
    result = rng.choice(('{"ok": true}', "done", '{"status": "done"}'))
    return Use(tool, f"{{please|can you|}} {verb} the {noun} {value}{{.|}}", {key: value}, result, f"Done: {verb} the {noun} {value}.", f"{verb} a {noun}.", f"Which {noun}?", value)  # fmt: skip


USES = ((4, weather), (2.5, clock), (2.5, calculator), (2, search), (2, mail), (1.5, reminder), (1.5, convert), (5, anything))  # fmt: skip


def tool_conversation(rng: random.Random, told: str, other: Callable[[Memory], tuple[str, str]]) -> list[Turn]:
    """One to three questions with tools at hand; ``other`` gives exchanges that need none."""
    makers = rng.choices([f for _, f in USES], [w for w, _ in USES], k=rng.choice((1, 1, 2, 3)))
    uses = {maker: maker(rng) for maker in makers}
    turns = [("system", offer(told, [use.schema for use in uses.values()]))]
    m = Memory(rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.3:
            ask, answer = other(m)
            turns += [("user", ask), ("assistant", answer)]
        else:
            maker = rng.choice(list(uses))
            turns += used(rng, again(maker, uses[maker], rng))
    return turns


def again(maker: Callable[[random.Random], Use], offered: Use, rng: random.Random) -> Use:
    """Another need for the tool that was offered: with its own schema, so by the same names."""
    for _ in range(60):
        fresh = maker(rng)
        if list(fresh.arguments) == list(offered.arguments) and maker is not anything and maker is not calculator:
            return Use(offered.schema, fresh.ask, fresh.arguments, fresh.result, fresh.answer, fresh.vague, fresh.missing, fresh.given)  # fmt: skip
    return offered


def used(rng: random.Random, use: Use) -> list[Turn]:
    turns = [("user", rough(cap(expand(use.ask, rng)), rng, keep_words=True))]
    if use.vague and rng.random() < 0.12:
        turns = [("user", cap(expand(use.vague, rng))), ("assistant", use.missing), ("user", use.given)]
    return [
        *turns,
        ("assistant", call_text(use.schema["name"], use.arguments)),
        ("tool", use.result),
        ("assistant", use.answer),
    ]
