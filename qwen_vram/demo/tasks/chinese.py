"""Chinese questions on facts of a small closed world, counting, and short passages.

Questions are in Simplified Chinese with full-width punctuation; every answer is one sentence.
"""

from __future__ import annotations

from random import Random

from qwen_vram.demo.tasks import chinese_words as words
from qwen_vram.demo.tasks.base import Example

CATEGORY = "chinese"

_OPENINGS = ("", "", "请问，", "请回答：", "想一想，", "问题：", "我想知道，", "小测验：")
_ENDINGS = ("", "", "请用一句话回答。", "请简短回答。")


def situation(rng: Random) -> list[Example]:
    """Draw one fact, one sum told as a story, or one passage with a question."""
    draw = rng.choice(
        (
            _capital,
            _antonym,
            _measure_word,
            _colour,
            _category,
            _habitat,
            _counting,
            _next_in_order,
            _whereabouts,
            _liking,
            _possession,
        )
    )
    question, answer = draw(rng)
    prompt = f"{rng.choice(_OPENINGS)}{question}{rng.choice(_ENDINGS)}"
    return [Example(category=CATEGORY, prompt=prompt, answer=answer)]


def _capital(rng: Random) -> tuple[str, str]:
    country, city = rng.choice(tuple(words.CAPITALS.items()))
    if rng.random() < 0.5:
        question = rng.choice(("{}的首都是哪里？", "{}的首都是哪座城市？", "哪座城市是{}的首都？", "{}的首都叫什么？"))
        return question.format(country), f"{country}的首都是{city}。"
    question = rng.choice(("{}是哪个国家的首都？", "哪个国家的首都是{}？", "{}是哪国的首都？"))
    return question.format(city), f"{city}是{country}的首都。"


def _antonym(rng: Random) -> tuple[str, str]:
    pair = rng.choice(words.ANTONYMS)
    word, opposite = pair if rng.random() < 0.5 else pair[::-1]
    question = rng.choice(
        (
            "“{}”的反义词是什么？",
            "什么是“{}”的反义词？",
            "请写出“{}”的反义词。",
            "与“{}”相反的词是什么？",
        )
    )
    return question.format(word), f"“{word}”的反义词是“{opposite}”。"


def _measure_word(rng: Random) -> tuple[str, str]:
    noun, measure = rng.choice(tuple(words.MEASURE_WORDS.items()))
    number = rng.choice(words.NUMERALS[1:10])
    number = "两" if number == "二" else number
    question = rng.choice(
        (
            "“{number}（ ）{noun}”，括号里填什么量词？",
            "{noun}的量词是什么？请用“{number}”造词组。",
            "“{number}”和“{noun}”之间用什么量词？",
        )
    )
    return question.format(number=number, noun=noun), f"应该说“{number}{measure}{noun}”。"


def _colour(rng: Random) -> tuple[str, str]:
    thing, colour = rng.choice(tuple(words.COLOURS.items()))
    question = rng.choice(("{}是什么颜色的？", "{}是什么颜色？", "{}一般是什么颜色的？", "说说{}的颜色。"))
    return question.format(thing), f"{thing}是{colour}的。"


def _category(rng: Random) -> tuple[str, str]:
    kind, members = rng.choice(tuple(words.KINDS.items()))
    member = rng.choice(members)
    question = rng.choice(("{}属于哪一类？", "{}是哪一类东西？", "{}属于什么类别？", "{}应该归入哪一类？"))
    return question.format(member), f"{member}属于{kind}。"


def _habitat(rng: Random) -> tuple[str, str]:
    animal, place = rng.choice(tuple(words.HABITATS.items()))
    question = rng.choice(("{}生活在哪里？", "{}住在什么地方？", "在哪里能见到{}？", "{}的家在哪里？"))
    return question.format(animal), f"{animal}生活在{place}。"


def _counting(rng: Random) -> tuple[str, str]:
    name = rng.choice(words.NAMES)
    thing = rng.choice(words.COUNTABLES)
    measure = words.MEASURE_WORDS[thing]
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    if rng.random() < 0.5:
        story = f"{name}有{_count(a)}{measure}{thing}，又买了{_count(b)}{measure}"
        result = a + b
    else:
        a, b = a + b, b
        story = f"{name}有{_count(a)}{measure}{thing}，送给别人{_count(b)}{measure}"
        result = a - b
    question = rng.choice(
        (
            f"{name}现在有几{measure}{thing}？",
            f"现在{name}一共有多少{measure}{thing}？",
            f"{name}手里还有几{measure}{thing}？",
        )
    )
    return f"{story}，{question}", f"{name}现在有{_count(result)}{measure}{thing}。"


def _next_in_order(rng: Random) -> tuple[str, str]:
    series = rng.choice(words.SERIES)
    at = rng.randrange(len(series) - 1)
    earlier, later = series[at], series[at + 1]
    if rng.random() < 0.5:
        question = rng.choice(("{}后面是什么？", "{}的后一个是什么？", "紧跟在{}之后的是什么？"))
        return question.format(earlier), f"{earlier}后面是{later}。"
    question = rng.choice(("{}前面是什么？", "{}的前一个是什么？", "排在{}之前的是什么？"))
    return question.format(later), f"{later}前面是{earlier}。"


def _whereabouts(rng: Random) -> tuple[str, str]:
    people = rng.sample(words.NAMES, rng.randint(2, 4))
    places = rng.sample(tuple(words.ACTIVITIES), len(people))
    doing = [rng.choice(words.ACTIVITIES[place]) for place in places]
    story = "，".join(f"{who}在{where}{what}" for who, where, what in zip(people, places, doing, strict=True))
    at = rng.randrange(len(people))
    person = people[at]
    if rng.random() < 0.5:
        question = rng.choice((f"{person}在哪里？", f"{person}在什么地方？"))
        return f"{story}。{question}", f"{person}在{places[at]}。"
    question = rng.choice((f"{person}在做什么？", f"{person}正在干什么？"))
    return f"{story}。{question}", f"{person}在{doing[at]}。"


def _liking(rng: Random) -> tuple[str, str]:
    people = rng.sample(words.NAMES, rng.randint(2, 4))
    kind = rng.choice(tuple(words.KINDS))
    liked = rng.sample(words.KINDS[kind], len(people))
    story = "，".join(f"{person}喜欢{thing}" for person, thing in zip(people, liked, strict=True))
    at = rng.randrange(len(people))
    question = rng.choice((f"{people[at]}喜欢什么？", f"{people[at]}喜欢的是什么？"))
    return f"{story}。{question}", f"{people[at]}喜欢{liked[at]}。"


def _possession(rng: Random) -> tuple[str, str]:
    people = rng.sample(words.NAMES, rng.randint(2, 4))
    things = rng.sample(words.COUNTABLES, len(people))
    numbers = [_count(rng.randint(1, 10)) for _ in people]
    phrases = [f"{number}{words.MEASURE_WORDS[thing]}{thing}" for number, thing in zip(numbers, things, strict=True)]
    story = "，".join(f"{person}有{phrase}" for person, phrase in zip(people, phrases, strict=True))
    at = rng.randrange(len(people))
    question = rng.choice((f"{people[at]}有什么？", f"{people[at]}的东西是什么？"))
    return f"{story}。{question}", f"{people[at]}有{phrases[at]}。"


def _count(number: int) -> str:
    """Spell a number that stands before a measure word, where two is 两 and not 二."""
    return "两" if number == 2 else words.NUMERALS[number]
