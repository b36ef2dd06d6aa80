"""The embedded corpus: a grammar that writes documents and knows what every word of them costs.

A language model is trained to lower its cross-entropy, and cross-entropy is never below the
entropy of the source. For ordinary text that entropy is unknown, so nobody can say how good a
loss of 1.9 really is. Here the source is ours. Each document is written by weighted choices,
and a choice of probability p costs -log2(p) bits. No document can be written in two ways (a
parser in tests/ checks that), hence the sum over its choices is exactly -log2 P(document): the
*floor*. A model that learned everything reaches it; nothing gets below it, at any size.

    >>> rules = read("coin = heads | 3*tails")        # tails is three times as likely as heads
    >>> [(option, round(math.log2(4 / weight), 3)) for weight, option in rules["coin"].options]
    [('heads', 2.0), ('tails', 0.415)]

A coin that falls 1/4 on heads costs 1/4 * 2 + 3/4 * 0.415 = 0.811 bits a throw on average.

Notation: a line `rule = ...` gives the alternatives, separated by `|`, `3*` being a weight.
`{rule}` expands a rule defined above, `[a|b]` is a choice on the spot, `{hero=name}` draws a
variable from the words of a rule and shows it, `{friend=name!hero}` draws one that differs from
the hero, and `$hero` repeats a variable, which costs nothing: a model has to remember it.

    python data/stories.py --n 5 --genre stories      # prints some documents with their bits
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
from collections import deque
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: let it find its neighbours
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.run.files import replacing  # noqa: E402
from data.run.flags import OneLineParser, number  # noqa: E402

# --- 1. The grammar -------------------------------------------------------------------------------
# Words first: the lists are long and used everywhere, so that every document is new while every
# word is met often enough to be learned in minutes. "a" fits all of them.

WORDS = """
name = Anna | Bruno | Clara | Dora | Emil | Felix | Greta | Hugo | Ida | Jonas | Kiki | Leo | Mina
    | Nora | Otto | Pip
trait = bald | bold | bossy | brave | careful | cheerful | clever | clumsy | cranky | curious
    | dizzy | dreamy | famous | fearless | friendly | fussy | gentle | greedy | grumpy | handsome
    | hungry | jolly | kind | lazy | lively | loyal | lucky | merry | messy | mighty | modest
    | moody | nervous | noisy | patient | polite | proud | restless | shy | silly | sleepy
    | stubborn | sturdy | thoughtful | tidy | wise | witty | young
creature = badger | baker | barber | bear | beaver | beetle | camel | cat | cook | cow | crow
    | doctor | dog | donkey | dragon | duck | farmer | fox | frog | ghost | giant | goat | goose
    | hen | king | knight | lion | monkey | mouse | panda | pig | pirate | pony | queen | rabbit
    | robin | robot | sailor | seal | snail | spider | tiger | walrus | whale | witch | wizard
    | wolf | zebra
look = bent | blue | broken | burnt | cheap | copper | cracked | crooked | dented | dusty | faded
    | fancy | fluffy | folded | frozen | golden | greasy | green | heavy | hollow | lumpy | magic
    | mossy | muddy | painted | paper | pink | plastic | purple | red | rotten | round | rusty
    | shiny | silk | silver | soft | square | sticky | striped | tangled | tiny | torn | velvet
    | warm | white | wobbly | wooden
thing = basket | bell | button | clock | drum | hat | kettle | key | kite | ladder | lantern | map
    | mirror | spoon | trumpet | wagon
goods = apples | balloons | barrels | boats | books | boots | bottles | bricks | brooms | buckets
    | candles | carpets | chairs | coins | crates | cushions | doors | feathers | flags | forks
    | gloves | hammers | lamps | letters | marbles | nails | pebbles | pianos | pillows | pipes
    | plates | pots | puppets | ribbons | ropes | sacks | shells | socks | stamps | stools | swords
    | teapots | tents | toys | umbrellas | violins | whistles | wigs
place = bakery | barn | beach | bridge | canal | castle | cave | circus | cliff | farm | forest
    | garden | harbour | hill | hotel | island | lake | library | lighthouse | market | meadow
    | mill | museum | palace | park | pond | river | school | station | swamp | tower | village
kept = crowded | distant | empty | foggy | haunted | hidden | little | lonely | narrow | old | quiet
    | royal | secret | sunny | windy | yellow
food = beans | biscuits | bread | butter | cabbage | carrots | celery | cheese | cherries | chips
    | corn | cream | custard | dates | dumplings | figs | fudge | garlic | ginger | grapes | gravy
    | honey | jam | jelly | leeks | lemons | lentils | melons | mushrooms | mustard | noodles | nuts
    | oats | olives | onions | pancakes | pasta | peaches | pears | peas | pickles | plums
    | porridge | radishes | rice | spinach | turnips | waffles
do = borrow | bury | carry | collect | count | decorate | deliver | guard | inspect | juggle | kick
    | label | measure | mend | paint | polish | repair | rescue | sketch | stack | tickle | trade
    | wash | weigh
did = borrowed | buried | carried | collected | counted | decorated | delivered | guarded
    | inspected | juggled | kicked | labelled | measured | mended | painted | polished | repaired
    | rescued | sketched | stacked | tickled | traded | washed | weighed
doing = borrowing | burying | carrying | collecting | counting | decorating | delivering | guarding
    | inspecting | juggling | kicking | labelling | measuring | mending | painting | polishing
    | repairing | rescuing | sketching | stacking | tickling | trading | washing | weighing
went = bounced | crawled | crept | danced | dashed | floated | galloped | hopped | hurried | jumped
    | limped | marched | raced | rolled | rushed | skipped | slid | sneaked | strolled | stumbled
    | tiptoed | trotted | walked | wandered
calmly = angrily | warmly | boldly | bravely | busily | calmly | carefully | gently | gladly
    | gracefully | happily | loudly | merrily | neatly | nervously | politely | proudly | quickly
    | quietly | sadly | secretly | slowly | softly | wisely
number = two | three | four | five | six | seven | eight | nine | ten | eleven | twelve | twenty
    | thirteen | fifteen | sixty | ninety
weather = breezy | bright | chilly | cloudy | cold | damp | dark | frosty | gloomy | hot | mild
    | misty | rainy | snowy | stormy | wet
weekday = Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | Sunday
day = {weekday} | 2*morning | 2*evening | 2*afternoon | 2*night
near = above | behind | below | beside | beyond | near | opposite | past
said = answered | bellowed | cried | giggled | mumbled | muttered | said | sang | shouted | sighed
    | whispered | yelled
"""

# --- 2. Phrases and the five genres ---------------------------------------------------------------
# The hero opens sentences, the friend comes after a verb or "and", names and things are never
# inflected: what is recalled looks the same wherever it stands.

PHRASES = """
one = One {weather} {day}
spot = {near} the {kept} {place}
being = {trait} {creature}
pile = {number} {look} {goods}
meal = {food} [and|with] {food}
say = We need {pile}! | I smell {meal}! | Never trust a {being}! | The {goods} are full of {food}!
    | Please {do} the {look} {goods}! | My {creature} will {do} your {goods}!
    | Put some {food} in my {goods}! | No {creature} can {do} {pile}!
"""

STORIES = """
there = , there was a {being} called {hero=name} who [loved {doing} {look} {goods}|lived {spot}].
    | , in the {kept} {place}, a {being} called {hero=name} [{did} {pile}|lived on {meal}].
met = a {being} called {friend=name!hero}
lost = lost a {look} {thing=thing} {spot}. $hero {calmly} asked {met} for help. $hero and $friend
    {did} {pile} and found the $thing full of {food}. "{say}" {said} the $thing, and $hero
    {calmly} hugged it.
boat = built a boat from {goods} and {goods}, with a {look} {thing=thing} as the sail. On board
    was {met}. $hero and $friend {calmly} sailed past {pile} and landed {spot}. There $hero traded
    the $thing for {meal}.
feast = cooked {meal} in a {look} {thing=thing}. The smell woke {met}, who {went} {calmly} from the
    {kept} {place} with {pile}. $hero and $friend {calmly} emptied the $thing and {did} the
    {goods}.
magic = found a {look} {thing=thing} that could talk. "{say}" {said} the $thing. $hero {went}
    {calmly} to {met}, but the $thing {said}, "{say}" So $hero and $friend hid it {spot}.
moon = tied {pile} to a {look} {thing=thing} and {calmly} flew to the moon. There sat {met},
    {calmly} {doing} {look} {goods}. $hero and $friend ate {meal}, filled the $thing with {food}
    and {went} home.
wind = the wind blew a {look} {thing=thing} over the {kept} {place}. $hero climbed {pile} to reach
    it, but {calmly} fell into {meal}. Then {met} came by, {doing} {look} {goods}, caught the
    $thing and threw it to $hero.
race = {met} raced $hero to the {kept} {place} for a {look} {thing=thing}. $hero {went} {calmly}
    past {pile}, but $friend {went} {calmly} and stopped for {meal}. The $thing went to
    [$hero|$friend], who filled it with {food}.
noise = something {said} {calmly} in the {kept} {place}. $hero took a {look} {thing=thing} and
    {went} inside. It was only {met}, {calmly} {doing} {pile}. $hero lifted the $thing and {said},
    "{say}"
plot = 5*$hero [{lost}|{boat}|{feast}|{magic}|{moon}] | {wind} | {race} | {noise}
coda = After that, $hero and $friend {calmly} {did} {look} {goods} every {day}.
    | From then on, $hero and $friend shared {look} {goods} and {meal}.
    | That {weather} night, $hero {calmly} dreamed of {pile}.
    | To this day, the {kept} {place} smells of {meal}.
    | $hero never {did} {look} {goods} again, and neither did $friend.
    | Everyone {calmly} threw {pile} at $hero and $friend.
    | The end was {weather}, but $hero and $friend were {trait} and {trait}.
    | If the {goods} are not {look}, $hero and $friend are still {doing} {goods}.
story = Once, upon a time{there} {one}, {plot} {coda}
"""

NEWS = """
lead = On {weekday}, a {being} called {hero=name} {calmly} {did} {pile}.
    | Police stopped a {being} called {hero=name} for {calmly} {doing} {pile}.
    | 2*A {being} called {hero=name} [won {pile} for {doing} {goods}|opened a {look} school for
    {doing} {look} {goods}].
scene = Crowds {went} {calmly} to the $place to see $hero and brought {meal}.
    | Mayors from {number} towns sent $hero a {look} medal and {meal}.
    | Every {trait} {creature} in the $place now wants {pile} from $hero.
    | So the $place was closed until {weekday}, and $hero had to {do} {pile}.
voice = 2*"{say}" [$hero {calmly} told the {creature} of the $place.|{said} $hero {calmly}.]
    | Asked about {meal}, $hero {calmly} {said}, "{say}"
close = Sport: the {look} {goods} beat the {trait} {goods} by {number} to {number}.
    | Prices: {food} rose by {number} coins and {food} fell by {number}.
    | Weather: the $place will be {weather}, with a {weather} {day} to follow.
    | Wanted: a {being} to {do} {look} {goods} at the $place.
news = News from the {kept} {place=place}: {lead} {scene} {voice} {close}
"""

RECIPES = r"""
dish = cake | curry | pie | pizza | pudding | salad | sandwich | soup | stew | tart
taste = bitter | creamy | crispy | crunchy | dry | fresh | hot | juicy | mild | minty | nutty
    | plain | raw | rich | ripe | salty | smoky | sour | spicy | sweet | tangy | tender | thick
    | thin
unit = bags | bowls | cups | grams | jars | pinches | pounds | slices | spoons | tins
cook = Bake | Boil | Chop | Fry | Grate | Grill | Mash | Mix | Peel | Roast | Simmer | Slice
    | Soak | Steam | Stir | Toast
some = {number} {unit} of {taste} {food}
step = 3*{cook} [2*the [{food} with {some}|{taste} $dish for {number} minutes]|{some} in a {look}
    pan]. | Pour the {taste} {food} over the $dish.
last = Serve the $dish {calmly} to {number} {trait} guests with {meal}.
    | Eat the $dish while it is {taste}, best on a {weather} {day}.
    | Hide the $dish from every {being} {spot}.
    | Decorate the $dish with {food} and {number} {look} {goods}.
recipe = Recipe for {taste} {dish=dish} with {food}\nTake {some}, {some} and {some}.\n1. {step}\n2.
    {step}\n3. {step}\n4. {last}
"""

SCIENCE = """
atoms = atoms | bubbles | clouds | comets | crystals | drops | electrons | galaxies | gases | ions
    | lasers | magnets | metals | molecules | moons | neutrons | particles | photons | planets
    | protons | quarks | rays | stars | waves
force = charge | density | distance | energy | entropy | force | friction | gravity | heat | light
    | mass | momentum | motion | power | pressure | radiation | sound | space | speed | time
    | torque | voltage | weight | work
moving = bend | boil | bounce | burn | collide | crack | decay | drift | expand | fade | float
    | freeze | glow | hum | melt | orbit | scatter | shine | shrink | sink | spin | split | swing
    | vibrate
tool = battery | camera | compass | computer | engine | lens | motor | prism | pump | radar
    | rocket | sensor | telescope | thermometer | turbine | wheel
law = {look} {atoms} {moving} when {force} meets {force} | {atoms} lose {force} as they {moving}
    | 2*{force} [turns {atoms} into {look} {atoms}|is {force} times {force}]
field = Science and Technology are [the study of {force}, {force} and {look} {atoms}|why {atoms}
    {moving} and {goods} do not|full of {look} {atoms} that {moving} with {force}|useful to every
    {being} with {pile}].
    | Physics [tells us that {law}|asks why {atoms} {moving} {near} {look} {atoms}|is the art of
    {doing} {atoms} with {force} and {force}|began when a {being} {did} {pile}].
test = In {number} {look} tests, the $tool heated {food} until the {atoms} began to {moving}.
    | Inside the $tool, {number} {look} {atoms} {moving} without any {force}.
    | When the $tool met {force}, the {look} {atoms} began to {moving} {calmly}.
    | For {number} {weather} days, the $tool {calmly} {did} {look} {atoms}.
result = From this $hero concluded that {law}. | So the $tool of $hero proved that {law}.
    | Still, $hero and the $tool cannot explain why {look} {atoms} {moving}.
    | For this $hero got a {look} medal and {meal}.
science = {field} Professor {hero=name}, a {being}, {calmly} built a {look} {tool=tool} from {pile}
    to measure {force} {spot}. {test} {result}
"""

PLAYS = r"""
stage = a {weather} {day} {spot} | the {kept} {place}, {pile} on the floor
talk = Who {calmly} {did} my {goods}, $friend?\n- $friend: The {being} from the {place}, $hero!
    | What is in the {look} {goods}, $friend?\n- $friend: Only {meal} for the {creature}, $hero!
    | Where did you {do} the {look} {goods}, $friend?\n- $friend: In the {kept} {place}, $hero!
    | Shall we {do} the {look} {goods}, $friend?\n- $friend: First I want {meal}, $hero!
    | How much {food} can you eat, $friend?\n- $friend: As much as {number} {trait} {goods}, $hero!
    | Listen, $friend! {say}\n- $friend: You are a {trait}, {trait} {creature}, $hero!
exit = 3*$hero and $friend [{calmly} {do} the {look} {goods}|leave with {meal}|fall asleep {spot}].
    | a {being} enters, and $hero and $friend {calmly} hide in the {look} {goods}.
play = Scene: {stage}. Enter {hero=name}, a {being}, and {friend=name!hero}, a {being}.\n- $hero:
    {talk}\n- $hero: {talk}\nThen {exit}
"""

DOCUMENT = "document = 8*{story} | 3*{news} | 3*{recipe} | 3*{science} | 3*{play}"

# --- 3. From notation to nodes --------------------------------------------------------------------
# Fixed text is a plain str; the other kinds of node:


class Sequence(NamedTuple):
    parts: tuple  # one node after the other


class Choice(NamedTuple):
    options: tuple  # (weight, node) pairs
    table: tuple  # (bits, node) pairs, each as often as its weight says: drawn uniformly


class First(NamedTuple):
    variable: str  # drawn here, shown here
    words: tuple
    other: str | None  # a variable whose word it must not take
    bits: float


class Again(NamedTuple):
    variable: str


TOKEN = re.compile(r"[{}\[\]|]|\$[a-z]+|(?:(?<=[\[|])\d+\*)|[^{}\[\]|$]+")


def choice(weighted):
    """The node for (weight, node) pairs; a single alternative is no choice."""
    if len(weighted) == 1:
        return weighted[0][1]
    total = sum(weight for weight, _ in weighted)
    table = [[(math.log2(total / weight), node)] * weight for weight, node in weighted]
    return Choice(tuple(weighted), tuple(itertools.chain(*table)))


def read(notation):
    """Rules by name, from lines in the notation above; a rule may use those before it only."""
    rules = {}
    for line in re.sub(r"\n +", " ", notation).strip().splitlines():
        name, _, alternatives = line.partition(" = ")
        tokens = TOKEN.findall("[" + re.sub(r" \| ", "|", alternatives.strip()) + "]")
        rules[name] = _read_choice(iter(tokens[1:]), rules)
    return rules


def _read_choice(tokens, rules):
    weighted, weight, parts = [], 1, []
    for token in tokens:
        if token in "|]":
            weighted.append((weight, parts[0] if len(parts) == 1 else Sequence(tuple(parts))))
            weight, parts = 1, []
            if token == "]":
                return choice(weighted)
        elif token == "[":
            parts.append(_read_choice(tokens, rules))
        elif token == "{":
            parts.append(_read_braces(next(tokens), rules))
            next(tokens)  # the closing brace
        elif token[0] == "$":
            parts.append(Again(token[1:]))
        elif token[-1] == "*" and not parts:
            weight = int(token[:-1])
        else:
            parts.append(token.replace("\\n", "\n"))
    raise ValueError("a choice without its closing bracket")


def _read_braces(inside, rules):
    variable, equals, name = inside.partition("=")
    if not equals:
        return rules[inside]
    name, _, other = name.partition("!")
    words = tuple(word for _, word in rules[name].options)
    return First(variable, words, other or None, math.log2(len(words) - bool(other)))


NOTATION = WORDS + PHRASES + STORIES + NEWS + RECIPES + SCIENCE + PLAYS + DOCUMENT
RULES = read(NOTATION)
GRAMMAR = RULES["document"]

# --- 4. Drawing documents -------------------------------------------------------------------------

OPENINGS = {
    "Once": "stories",
    "News": "news",
    "Recipe": "recipes",
    "Science": "science",
    "Physics": "science",
    "Scene": "plays",
}
END = "\n<|endoftext|>\n"
CHUNK = 1000  # documents a worker draws at a time


class Span(NamedTuple):
    start: int  # bytes (all text is ASCII) within the document
    end: int
    kind: str  # choice: just picked; recall: repeats a variable; rest: fixed text
    bits: float  # what a perfect model pays for it: 0 unless something was picked


class Document(NamedTuple):
    text: str
    genre: str
    bits: float
    spans: list


def draw(node, uniform, known, out):
    """Appends (text, kind, bits) to out; uniform() is in [0, 1), known holds the variables."""
    if type(node) is str:
        out.append((node, "rest", 0.0))
    elif type(node) is Sequence:
        for part in node.parts:
            draw(part, uniform, known, out)
    elif type(node) is Choice:
        bits, option = node.table[int(uniform() * len(node.table))]
        if type(option) is str:
            out.append((option, "choice", bits))
        else:
            out.append(("", "choice", bits))
            draw(option, uniform, known, out)
    elif type(node) is Again:
        out.append((known[node.variable], "recall", 0.0))
    else:
        words = [word for word in node.words if word != known.get(node.other)]
        known[node.variable] = word = words[int(uniform() * len(words))]
        out.append((word, "choice", node.bits))


def _pieces(index, seed, split):
    out = []
    draw(GRAMMAR, random.Random(f"{seed}:{split}:{index}").random, {}, out)
    return out


def document(index, seed=0, split="train"):
    """Document number index of a split; any index, in any order, always the same.

    >>> story = document(0)
    >>> math.isclose(story.bits, sum(span.bits for span in story.spans))
    True
    """
    text, bits, spans = assemble(_pieces(index, seed, split))
    genre = next(name for opening, name in OPENINGS.items() if text.startswith(opening))
    return Document(text, genre, bits, spans)


def assemble(pieces):
    """The text of (text, kind, bits) pieces, its bits, and the spans that cover it."""
    spans, text, pending = [], "", 0.0
    for piece, kind, bits in pieces:
        pending += bits
        if piece:
            # a space goes with the word it precedes, as it does in the tokens of bpe.py
            start = len(text) - text.endswith(" ")
            if spans and start < spans[-1].end:
                spans[-1] = spans[-1]._replace(end=start)
            text += piece
            spans.append(Span(start, len(text), "choice" if pending else kind, pending))
            pending = 0.0
    spans = [span for span in spans if span.end > span.start or span.bits]
    return text, math.fsum(bits for _, _, bits in pieces), spans


def _chunk(start, seed, split):
    documents = (_pieces(index, seed, split) for index in range(start, start + CHUNK))
    return ["".join([piece for piece, _, _ in pieces]) for pieces in documents]


def texts(seed, split, workers=1):
    """The documents of a split one after the other, without end; the same for any workers."""
    chunk, starts = partial(_chunk, seed=seed, split=split), itertools.count(0, CHUNK)
    if workers == 1:
        yield from itertools.chain.from_iterable(map(chunk, starts))
        return
    with multiprocessing.Pool(workers) as pool:
        ahead = deque()  # so that nobody waits while the oldest is written
        while True:
            while len(ahead) < 2 * workers:
                ahead.append(pool.apply_async(chunk, (next(starts),)))
            yield from ahead.popleft().get()


# --- 5. The cache: three files, each complete or absent -------------------------------------------

FILES = ("train.txt", "val.txt", "floor.json")


class Paths(NamedTuple):
    train: Path  # documents, each followed by a line <|endoftext|>
    val: Path
    floor: Path  # JSON, a list over the documents of val: [genre, bits, [[start, end, kind, bits]]]


def write(folder, train_bytes=16_000_000, val_bytes=400_000, seed=0, workers=0):
    """Paths of the corpus, drawn now unless an earlier call with the same arguments did it.

    workers: processes, which change nothing but the time; 0: one for every 16 MB, cores permitting.
    """
    workers = workers or max(1, min(os.cpu_count() or 1, train_bytes // 16_000_000))
    key = (Path(__file__).read_bytes(), train_bytes, val_bytes, seed)  # any edit: new files
    sizes, val = (train_bytes, val_bytes), partial(document, seed=seed, split="val")
    return save(folder, "stories", key, sizes, lambda: texts(seed, "train", workers), val)


def save(folder, name, key, sizes, train, val):
    """Paths of a key's files, drawn where missing: train() yields texts, val(index) a Document."""
    train_bytes, val_bytes = sizes
    stem = f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    paths = Paths(*(Path(folder) / f"{stem}-{file}" for file in FILES))
    Path(folder).mkdir(parents=True, exist_ok=True)
    if not paths.train.exists():
        _write(paths.train, _until(train_bytes, train()))
    if not paths.val.exists() or not paths.floor.exists():
        size = len(list(_until(val_bytes, (val(index).text for index in itertools.count()))))
        documents = [val(index) for index in range(size)]
        _write(paths.val, (text + END for text, *_ in documents))
        _write(paths.floor, [json.dumps([document[1:] for document in documents])])
    return paths


def _until(size, documents):
    """Documents with their separators, up to the first that fills size bytes."""
    for text in documents:
        yield text + END
        size -= len(text + END)
        if size <= 0:
            return


def _write(path, texts):
    with replacing(path) as file:
        file.writelines(text.encode("ascii") for text in texts)


def main(arguments=None):
    about = "Prints documents of the embedded corpus."
    parser = OneLineParser("data/stories.py", description=about)
    count = number(int, lambda n: n > 0, "above 0")
    parser.add_argument("--n", type=count, default=5, help="how many")
    parser.add_argument("--genre", choices=sorted(set(OPENINGS.values())), help="only this genre")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    documents = (document(index, args.seed) for index in itertools.count())
    wanted = (found for found in documents if args.genre in (None, found.genre))
    for text, genre, bits, _ in itertools.islice(wanted, args.n):
        print(f"[{genre}: {len(text)} bytes, {bits:.1f} bits]", file=sys.stderr)
        print(f"{text}\n<|endoftext|>", flush=True)  # on its own, a text to train on or to show


if __name__ == "__main__":
    main()
