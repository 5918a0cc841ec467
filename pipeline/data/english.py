"""Normalizes English questions: function words, inflected words, and different ways to ask the same question."""

import re
from itertools import combinations


def listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


ASK = "ask"  # "tell me", "give me", "name", "state", "could you say", "I would like to know"
BE = listed("is are was were")
DO = listed("do does did")
ASKING = listed("who whose what when where why how") | {ASK}
NEGATIONS = listed("not no never nor neither")
PRONOUNS = listed(
    """i you he she it we they me him her us them there here that this these those myself yourself himself herself
    itself ourselves yourselves themselves someone anyone everyone somebody anybody everybody something
    anything everything"""
)
DETERMINERS = listed(
    "the a an my your his its our their some any all each every both either such this that these those"
)
MODALS = listed("can could may might shall should will would must")
PREPOSITIONS = listed(
    """of in on at for to by with from about into onto through during within between among per via upon against than as
    like under over above below up down off out before after without since until towards toward around across
    along throughout regarding concerning beside besides beyond behind beneath inside outside despite except unless"""
)
CONJUNCTIONS = listed("and or but if so because while whether though although then else")
FILLERS = listed(
    """please kindly just also too really actually exactly currently presently now today ever still even again only
    simply perhaps maybe well ok okay hello hi hey normally usually generally typically precisely approximately roughly
    basically specifically already yet right one ones else very quite rather indeed probably possibly
    anyway honestly truly officially s t d"""
)
DATES = listed(  # words with a capital that are not names, so that "Mondays" equals "Monday"
    """monday tuesday wednesday thursday friday saturday sunday mondays tuesdays wednesdays thursdays fridays saturdays
    sundays"""
)
VERBS = BE | DO | listed("have be been being am having doing done")
POSSESSIVES = listed("mine yours ours theirs")
LIGHT = frozenset().union(  # function words
    ASKING, NEGATIONS, VERBS, PRONOUNS, POSSESSIVES, DETERMINERS, MODALS, PREPOSITIONS, CONJUNCTIONS, FILLERS
)
OPPOSITES = [  # replacing one word of a pair by the other makes a different question
    *(("before", "after"), ("with", "without"), ("over", "under"), ("above", "below"), ("up", "down"), ("on", "off")),
    *(("in", "out"), ("into", "out"), ("inside", "outside"), ("from", "to"), ("and", "or"), ("since", "until")),
    *combinations(("when", "where", "why", "how", "what"), 2),
    *combinations(("when", "where", "why", "how", "who"), 2),
]

# Words have only letters, so an apostrophe splits: "what's" is "what" and "s"; likewise "we're", "don't".
SHORT = {"s": "is", "re": "are", "m": "am", "ve": "have", "ll": "will", "d": "would"}
SHORTENED = PRONOUNS | ASKING | {"which", "whom"}  # before "s" and "d"; "Osk's" is a possessive
NOT = {"don": "do", "won": "will", "can": "can", "shan": "shall", "ain": "is"} | {
    word + "n": word for word in listed("is are was were does did has have had could would should might must need")
}
JOINED = {
    **{word + "s": [word, "is"] for word in ("what", "who", "where", "when", "how", "that", "there")},
    **{short + "t": [word, "not"] for short, word in NOT.items() if short not in ("won", "can")},
    "cannot": ["can", "not"],
    "im": ["i", "am"],
    "ive": ["i", "have"],
}
SAME = {"whom": "who", "which": "what", "has": "have", "had": "have", "an": "a"}

# "name" is a verb of asking in "name the room", but not in "the name of the room".
ASKS = listed("tell give show name state list specify indicate provide mention say identify quote describe explain")
KNOWS = listed("know wonder learn ask hear")
ASKED_FOR = DETERMINERS | ASKING | listed("which whom whether if two three four five")
NO_ASK_AFTER = DETERMINERS | listed("of s which what whose i we they he she it to who")
BEFORE_ASK = MODALS | listed("you i we do like want need wish love to let me us also")

# "which person" is "who". "at what time" and "in which year" are both "when", but they differ from each other. So such
# a word is written with its noun: "when:time", "when:year".
NOUN_SEPARATOR = ":"
WHICH = {
    **dict.fromkeys(["person", "people"], "who"),
    **{noun: f"when{NOUN_SEPARATOR}{noun}" for noun in ("time", "date", "day", "month", "year")},
    **{f"{noun}s": f"when{NOUN_SEPARATOR}{noun}" for noun in ("time", "date", "day", "month", "year")},
    **{noun: f"where{NOUN_SEPARATOR}{noun}" for noun in ("place", "location")},
    **dict.fromkeys(["way", "manner"], "how"),
    "reason": "why",
}

IRREGULAR_WORDS = """
    bind bound | bite bit bitten | blow blew blown | burn burnt | deal dealt | dig dug | drink drank drunk
    feed fed | fight fought | forget forgot forgotten | freeze froze frozen | hang hung | hear heard
    hide hid hidden | lend lent | ride rode ridden | ring rang rung | seek sought | shake shook shaken
    shine shone | sleep slept | slide slid | stick stuck | strike struck | swim swam swum | tear tore torn
    throw threw thrown | wake woke woken | withdraw withdrew withdrawn | wind wound | do done | agree agreed
    guarantee guaranteed | free freed | lead led | run ran | make made | buy bought | sell sold | hold held
    keep kept | write wrote written | pay paid | say said | send sent | spend spent | take took taken
    give gave given | begin began begun | come came | go went gone goes | get got gotten | know knew known
    see saw seen | build built | win won | leave left leaf leaves | lose lost | meet met | bring brought
    think thought | teach taught | catch caught | stand stood | understand understood | find found | tell told
    speak spoke spoken | choose chose chosen | drive drove driven | eat ate eaten | fall fell fallen
    fly flew flown | grow grew grown | show shown | wear wore worn | rise rose risen | sing sang sung
    draw drew drawn | break broke broken | feel felt | become became | mean meant | sit sat | shoot shot
    steal stole stolen | bear born bore | child children | man men | woman women | foot feet | tooth teeth
    mouse mice | life lives live | knife knives | half halves | shelf shelves | wolf wolves | wife wives
    loaf loaves | thief thieves | criterion criteria | index indices | person people persons | analysis analyses
    use used using uses | lie lies lay lain lying | die died dying dies | tie ties tied tying
    age aged ages aging
"""
IRREGULAR = {word: group[0] for group in map(str.split, re.split(r"[|\n]", IRREGULAR_WORDS)) for word in group}

ENDINGS = [("ies", "y"), ("ied", "y"), ("ing", ""), ("ed", "")]
NO_ENDING = ("ss", "us", "is", "eed")  # "process", "status", "need"


def stem(word: str) -> str:
    """The common stem of "lead", "leads", "led" and "leading". A stem need not be a word."""
    if not (word.isascii() and word.isalpha()):
        return word
    word = IRREGULAR.get(word) or IRREGULAR.get(rest := without_endings(word), rest)
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    if word.endswith("y"):
        word = word[:-1] + "i"
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def without_endings(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith((*NO_ENDING, "ies")):
        word = word[:-1]
    for ending, instead in ENDINGS:
        rest = word.removesuffix(ending) + instead
        if word.endswith(ending) and not word.endswith(NO_ENDING) and len(rest) > 2 and re.search("[aeiouy]", rest):
            return rest
    return word


def plainly(text: list[str]) -> list[str]:
    """`text` (a list of words) without contractions, and with one word for each way of asking."""
    return one_way_of_asking(in_full(text))


def in_full(text: list[str]) -> list[str]:
    full: list[str] = []
    for word in text:
        before = full[-1] if full else ""
        if word == "t" and before in NOT:
            full[-1:] = [NOT[before], "not"]
        elif word in ("s", "d") and before in SHORTENED:
            full.append("did" if word == "d" and before in ASKING else SHORT[word])
        elif word in ("re", "m", "ve", "ll") and before in SHORTENED:
            full.append(SHORT[word])
        elif word in JOINED:
            full += JOINED[word]
        elif word not in ("please", "kindly"):
            full.append(word)
    return full


def one_way_of_asking(text: list[str]) -> list[str]:
    said: list[str] = []
    rest = iter(enumerate(text))
    for at, word in rest:
        after = text[at + 1] if at + 1 < len(text) else ""
        if asks(text, at):
            while said and said[-1] in BEFORE_ASK:
                said.pop()
            said.append(ASK)
            if after in ("me", "us"):
                next(rest)
        elif word in ("what", "which") and after in WHICH:
            next(rest)
            if said and said[-1] in ("in", "on", "at", "for") and WHICH[after] != "who":
                said.pop()
            said.append(WHICH[after])
        elif word == "how" and after == "come":
            next(rest)
            said.append("why")
        else:
            said.append(SAME.get(word, word))
    return said


def asks(text: list[str], at: int) -> bool:
    word = text[at]
    if word not in ASKS and word not in KNOWS:
        return False
    before, after = text[at - 1] if at else "", text[at + 1] if at + 1 < len(text) else ""
    if word in KNOWS:
        return before in ("to", "you", "me", "i", "may") and after in ASKED_FOR
    if after in ("me", "us"):
        return before not in DETERMINERS
    if not at:
        return after not in PREPOSITIONS | BE
    if word == "show":
        return False
    if before == "you":
        return at > 1 and text[at - 2] in MODALS and after in ASKED_FOR
    return after in ASKED_FOR and before not in NO_ASK_AFTER


def is_light(word: str) -> bool:
    return word in LIGHT or NOUN_SEPARATOR in word


def asking(word: str) -> str:
    """The "when" of "when:year"; any other word unchanged."""
    return word.partition(NOUN_SEPARATOR)[0]


def noun_of(word: str) -> str:
    """The "year" of "when:year"; empty for any other word."""
    return word.partition(NOUN_SEPARATOR)[2]
