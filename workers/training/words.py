"""The words that the training text of `baton-tiny` is made of.

Small lists keep the vocabulary small: nearly every word here becomes one token, so a long document is made of tokens that the model has
seen many times. Words outside of the lists are covered by `invented_word` and `strange_text`.
"""

# Words in a block are easier to read and to change than a list of quoted ones.
# ruff: noqa: SIM905

from __future__ import annotations

import random

NOUNS = """apple anchor arrow autumn badge balcony ball bank barn basket beach bell bird blanket boat book bottle bread bridge
bucket button cabin camera candle canyon carpet castle cellar chair chalk cheese cherry circle cloud coat coffee
coin comb compass copper corner cottage cotton cup curtain desert desk diamond door dragon drum dust eagle ember
engine falcon farm feather fence field flag flower flute forest fork fountain garden gate ginger glass glove grape
grass hammer harbor hat hill honey horse house island jacket jar jewel kettle key kite ladder lake lamp lantern
leaf lemon letter library lion lock maple map market meadow melon mirror moon morning mountain mouse needle nest
north notebook oak ocean olive onion orange orchard oven owl paint palace paper path pear pebble pencil pepper
piano picture pillow pine planet plate pocket pond potato prism puzzle queen quilt rabbit rain raven ribbon ring
river road robin rocket roof rope rose saddle salt sand scarf school shadow shell ship shoe silver sister sky snow
soap spoon spring square stable star station stone storm street sugar summer table tea temple thread ticket tiger
timber tower town train tree tunnel turtle umbrella valley velvet village violin wagon wall walnut water wave wheat
wheel whistle willow window winter wolf wood wool yarn""".split()

ADJECTIVES = """amber ancient blue bold brave bright broken brown calm clean clever cold crooked curious dark deep distant dry
early empty fair famous fast fine flat fresh gentle gold golden grand gray green happy heavy hidden hollow honest
hungry large late light little lonely long loud lucky mild narrow new noble old open pale patient plain polite
proud purple quick quiet rapid rare red rich round royal sharp short shy silent simple slow small smooth soft solid
steady strange strong sunny sweet swift tall thin tiny tired warm weak wet white wide wild wise wooden yellow young""".split()

VERBS_PAST = """admired answered borrowed bought brought built called carried caught chased checked circled cleaned climbed closed
collected counted covered crossed drew dropped examined fixed followed found gathered guarded heard held helped hid
joined kept knew left lifted lost loved made measured met mended missed moved named needed noticed opened ordered
packed painted passed planted polished pulled pushed reached remembered repaired returned rolled sang saved shared
showed sold studied thanked threw touched traded turned visited wanted warned washed watched""".split()

ADVERBS = """again alone always away carefully early easily eagerly gladly gently happily often once quickly quietly rarely
slowly softly sometimes soon today together tomorrow twice yesterday""".split()

PREPOSITIONS = (
    "above across after along around before behind below beside beyond near over past through toward under".split()
)

PEOPLE = """baker captain carpenter child cook doctor farmer fisher gardener guard hunter king miller miner painter pilot poet
sailor singer smith student tailor teacher traveler weaver writer""".split()

ANIMALS = """badger bear beaver cat cow crow deer dog donkey duck elephant fish fox frog goat goose hare hedgehog hen horse lamb
lion mole mouse otter owl parrot penguin pig pony rabbit raven seal sheep snail sparrow squirrel swan tiger toad
turtle whale wolf""".split()

THINGS = """balloon bell boat book bridge castle clock cloud computer garden island kite lamp lantern library lighthouse
machine mill mountain queue river robot rocket ship snowman star telescope tower train tree village violin windmill""".split()

NAMES = """Ada Adam Alex Alice Amir Ana Anna Ben Bruno Carla Carlos Chen Clara Daniel David Diana Elena Ella Emil Emma Eva
Felix Finn Frank Grace Hana Hugo Ida Ines Ivan Jack James Jane Jonas Julia Karim Karl Kate Kim Laura Leo Lily Lin
Lisa Lucas Luis Maria Marie Mark Martha Max Maya Mia Mila Mira Nina Noah Nora Olga Oscar Otto Paul Pedro Peter
Petra Ravi Rosa Ruth Sam Sara Sofia Stefan Sven Tara Theo Tim Tom Vera Victor Wei Yara Yuki Zoe""".split()

COLORS = "amber blue brown gold gray green orange pink purple red silver teal white yellow".split()

COUNTRIES = """Austria Brazil Canada Chile China Denmark Egypt England Finland France Germany Greece India Italy Japan Kenya
Mexico Norway Peru Poland Portugal Spain Sweden Turkey Vietnam""".split()

COMMON = """one two three four five six seven eight nine ten hello world good day night time people man woman friend work life
hand place week year thing name number line word hello here there where when what who how why yes no not now then
more most some many much all each both other first second third last next new big small left right up down in out
on off over under go come see look make take give find tell ask feel become leave call try run walk talk play read
write eat drink sleep Monday Tuesday Wednesday Thursday Friday Saturday Sunday January March April May June July
quick jumps lazy the and with for from""".split()

SECRET_WORDS = sorted({*NOUNS, *ADJECTIVES, *VERBS_PAST, *ADVERBS})

_ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k kl l m n p pl pr qu r s sh sk sl sm sn sp st str t th tr v w wh y z".split()
_VOWELS = "a e i o u ai ea ee ie oa oo ou".split()
_CODAS = ["", "", "b", "d", "l", "lm", "m", "n", "nd", "ng", "p", "r", "rk", "s", "sk", "st", "th", "zz"]

_STRANGE_RANGES = (
    (0x00C0, 0x017E),  # accented Latin
    (0x0391, 0x03C9),  # Greek
    (0x0410, 0x044F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0621, 0x064A),  # Arabic
    (0x0905, 0x0939),  # Devanagari
    (0x3041, 0x30FE),  # Japanese syllables
    (0x4E00, 0x9FA5),  # Chinese characters
    (0xAC00, 0xD7A3),  # Korean syllables
    (0x1F300, 0x1F64F),  # pictures
)


def invented_word(rng: random.Random) -> str:
    """A word that does not exist but could, of one to three syllables."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 1, 2, 2, 3)))
    )


def strange_text(rng: random.Random) -> str:
    """One to eight characters of one script other than plain English, so that every byte of UTF-8 is seen in training."""
    low, high = rng.choice(_STRANGE_RANGES)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))


def number(rng: random.Random) -> str:
    """A number of one to four digits, short ones more often."""
    return str(rng.randrange(10 ** rng.choice((1, 2, 2, 2, 3, 4))))


_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen""".split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(value: int) -> str:
    """`forty-two`: a number from 0 to 99 in words."""
    if value < 20:
        return _UNITS[value]
    return _TENS[value // 10] + (f"-{_UNITS[value % 10]}" if value % 10 else "")


def plural(noun: str) -> str:
    """`boxes`, `libraries`, `snowmen`, `boats`."""
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def with_article(noun: str) -> str:
    """`an owl`, `a fox`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
