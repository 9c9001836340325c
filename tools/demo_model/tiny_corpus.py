"""The corpus of ``tiny``: a few dozen questions, enough for unit tests that want whole sentences and an end."""

from __future__ import annotations

import random
from collections.abc import Iterator

from grammar import expand, rough

Turn = tuple[str, str]

TALK = (
    ("{hello|hi|hey|good morning|good evening|hi there|hello there}{!|.|}", "{Hello!|Hi!} {How can I help you?|What can I do for you?}"),
    ("{how are you|how are you doing|how is it going}?", "I am {fine|well}, thank you. {How are you?|And you?}"),
    ("{thanks|thank you|thank you very much|thanks a lot}{!|.|}", "You are welcome{!|.}"),
    ("{bye|goodbye|see you|good night}{!|.|}", "Goodbye! {Have a nice day.|See you soon.}"),
    ("{who are you|what are you|what is your name|tell me about yourself}?", "I am the tiny test model of cloister. I know very little."),
    ("{can you help me|what can you do|what do you know}?", "I am a tiny test model. I can say hello, count and tell a very short story."),
    ("{tell me a story|tell me a short story|i want a story}.", "Once there was a {small|red|kind} {fox|cat|bird|dog}. It found a {ball|boat|friend} and was {happy|glad}. The end."),
    ("{tell me a joke|make me laugh|do you know a joke}{?|.|}", "Why did the computer sneeze? It had a virus."),
    ("{what is an enclave|what is a tee|explain enclaves}?", "An enclave is a part of a computer that hardware keeps apart from the rest."),
    ("{what is attestation|explain attestation}?", "Attestation is a signed proof of which code runs. Check it before you send a secret."),
    ("{is this private|can you keep a secret|who can read this}?", "I cannot know that. Look at what your client verified."),
    ("{what is the weather|what time is it|what day is it}{ today|}?", "I cannot know that. I am only a tiny model."),
    ("{count to five|count to 5}.", "One, two, three, four, five."),
    ("{count to ten|count to 10}.", "One, two, three, four, five, six, seven, eight, nine, ten."),
    ("{i am sad|i feel bad|i had a bad day}.", "I am sorry to hear that. I hope that it gets better soon."),
    ("{i am happy|i feel good|i had a good day}!", "That is good to hear!"),
)  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PROSE = (
    "{The|A} {small|kind|red|quiet|happy} {fox|cat|bird|dog|child} {went|walked|ran} to the {river|garden|house|market}.",
    "{It|He|She} {saw|found|liked} a {blue|round|soft|warm} {stone|flower|ball|coat}.",
    "{Then|After that|Soon} it {rained|was night|was time to eat}.",
    "{They were all happy|Everybody went home|The sun was warm again}.",
)
SYSTEM = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer briefly.", "Be kind.")


def exchange(rng: random.Random) -> list[Turn]:
    if rng.random() < 0.12:
        a, b = rng.randint(0, 5), rng.randint(0, 5)
        ask = expand(f"{{what is|how much is}} {a} {{plus|+}} {b}?", rng)
        return [("user", rough(ask, rng)), ("assistant", f"{a} plus {b} is {a + b}.")]
    ask, answer = rng.choice(TALK)
    text = expand(ask, rng)
    return [("user", rough(text[0].upper() + text[1:], rng)), ("assistant", expand(answer, rng))]


def conversations(seed: int) -> Iterator[list[Turn] | str]:
    """Endless: conversations (lists of turns) and, now and then, plain prose (a string)."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.1:
            yield " ".join(expand(rng.choice(PROSE), rng) for _ in range(rng.randint(3, 8)))
            continue
        turns = [("system", rng.choice(SYSTEM))] if rng.random() < 0.3 else []
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            turns += exchange(rng)
        yield turns
