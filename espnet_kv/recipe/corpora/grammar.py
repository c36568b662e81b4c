"""A small English grammar of about 200 words, with agreement, tense and typed objects."""

import random
from collections.abc import Callable

# Nouns: singular -> plural.
PEOPLE = {
    "farmer": "farmers", "teacher": "teachers", "doctor": "doctors", "sailor": "sailors",
    "painter": "painters", "driver": "drivers", "singer": "singers", "student": "students",
    "brother": "brothers", "sister": "sisters", "woman": "women", "child": "children",
}  # fmt: skip
ANIMALS = {
    "dog": "dogs", "horse": "horses", "bird": "birds", "rabbit": "rabbits", "monkey": "monkeys",
}  # fmt: skip
FOOD = {
    "apple": "apples", "potato": "potatoes", "sandwich": "sandwiches", "orange": "oranges",
    "mushroom": "mushrooms", "egg": "eggs",
}  # fmt: skip
TEXTS = {"letter": "letters", "story": "stories", "book": "books", "message": "messages"}
THINGS = {
    "window": "windows", "bottle": "bottles", "jacket": "jackets", "candle": "candles",
    "basket": "baskets", "guitar": "guitars", "hammer": "hammers", "mirror": "mirrors",
}  # fmt: skip
NAMES = ["anna", "peter", "maria", "robert", "laura", "victor"]
PLACES = [
    "garden", "kitchen", "village", "forest", "station", "market", "hospital", "library",
    "mountain", "harbor", "office", "castle",
]  # fmt: skip

# Adjectives by the class of their noun.
MOODS = ["happy", "tired", "hungry", "angry", "famous", "lonely"]
LOOKS = ["old", "young", "small", "beautiful", "strange"]
LOOKS_OF_THINGS = ["yellow", "purple", "broken", "heavy", "expensive", "wooden"]
NUMBERS = ["two", "three", "five", "six", "seven", "nine", "ten", "eleven", "twenty"]

# Verbs: base -> (third person, past), with the class of their object.
ACTIONS: list[tuple[dict[str, tuple[str, str]], dict[str, str]]] = [
    ({"eat": ("eats", "ate"), "cook": ("cooks", "cooked"), "taste": ("tastes", "tasted")}, FOOD),
    ({"write": ("writes", "wrote"), "study": ("studies", "studied")}, TEXTS),
    (
        {
            "carry": ("carries", "carried"), "break": ("breaks", "broke"),
            "sell": ("sells", "sold"), "borrow": ("borrows", "borrowed"),
        },
        THINGS,
    ),
    ({"feed": ("feeds", "fed"), "follow": ("follows", "followed")}, ANIMALS),
    ({"visit": ("visits", "visited"), "thank": ("thanks", "thanked")}, PEOPLE),
]  # fmt: skip
MOVES = {
    "walk": ("walks", "walked"), "run": ("runs", "ran"), "drive": ("drives", "drove"),
    "travel": ("travels", "traveled"), "return": ("returns", "returned"),
}  # fmt: skip
WAYS = ["to", "from", "through", "behind"]
SPOTS = ["in", "near", "behind", "outside"]

# Expressions of time by tense.
TIMES = {
    "past": ["yesterday", "last week", "last winter", "this morning"],
    "present": ["today", "every day", "every summer", "on sunday"],
    "future": ["tomorrow", "next week", "next month", "tonight"],
}


class Grammar:
    """Draws sentences. Words of a class are equally frequent: each list is drawn like a deck of
    cards, without replacement, and shuffled again when it is empty."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._decks: dict[tuple[str, ...], list[str]] = {}
        self._forms: list[Callable[[], str]] = [
            self._action, self._action, self._action_in_time, self._action_in_time,
            self._move, self._move, self._state, self._existence, self._relative, self._question,
        ]  # fmt: skip

    def sentence(self) -> str:
        """One sentence of 3 to 8 lower-case words."""
        while True:
            words = self._random.choice(self._forms)().split()
            if 3 <= len(words) <= 8:
                return " ".join(words)

    def _deal(self, words) -> str:
        deck = self._decks.setdefault(tuple(words), [])
        if not deck:
            deck.extend(words)
            self._random.shuffle(deck)
        return deck.pop()

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _noun_phrase(self, nouns: dict[str, str], looks: list[str]) -> tuple[str, bool]:
        """A phrase such as `three old dogs`, and whether it is plural."""
        noun = self._deal(nouns)
        adjective = self._deal(looks) + " " if self._chance(0.35) else ""
        plural = self._chance(0.45)
        if plural:
            determiner = self._deal(NUMBERS) if self._chance(0.6) else self._deal(["the", "some"])
            noun = nouns[noun]
        else:
            determiner = self._deal(["the", "my", "a", "the", "her", "our"])
            if determiner == "a" and (adjective or noun)[0] in "aeiou":
                determiner = "an"
        return f"{determiner} {adjective}{noun}", plural

    def _subject(self) -> tuple[str, bool]:
        if self._chance(0.3):
            return self._deal(NAMES), False
        if self._chance(0.25):
            pronoun = self._deal(["he", "she", "we", "they"])
            return pronoun, pronoun in ("we", "they")
        return self._noun_phrase(PEOPLE, LOOKS)

    def _verb(self, verbs: dict[str, tuple[str, str]], tense: str, plural: bool) -> str:
        base = self._deal(verbs)
        third, past = verbs[base]
        present = base if plural else third
        return {"past": past, "present": present, "future": f"will {base}"}[tense]

    def _object(self, nouns: dict[str, str]) -> str:
        looks = LOOKS if nouns is PEOPLE or nouns is ANIMALS else LOOKS_OF_THINGS
        return self._noun_phrase(nouns, looks)[0]

    def _clause(self, tense: str) -> str:
        subject, plural = self._subject()
        verbs, objects = self._random.choice(ACTIONS)
        return f"{subject} {self._verb(verbs, tense, plural)} {self._object(objects)}"

    def _place(self, prepositions: list[str]) -> str:
        return f"{self._deal(prepositions)} the {self._deal(PLACES)}"

    def _action(self) -> str:
        clause = self._clause(self._deal(TIMES))
        return f"{clause} {self._place(SPOTS)}" if self._chance(0.5) else clause

    def _action_in_time(self) -> str:
        tense = self._deal(TIMES)
        time, clause = self._deal(TIMES[tense]), self._clause(tense)
        return f"{time} {clause}" if self._chance(0.5) else f"{clause} {time}"

    def _move(self) -> str:
        tense = self._deal(TIMES)
        subject, plural = self._subject()
        move = f"{subject} {self._verb(MOVES, tense, plural)} {self._place(WAYS)}"
        return f"{move} {self._deal(TIMES[tense])}" if self._chance(0.5) else move

    def _state(self) -> str:
        subject, plural = self._subject()
        tense = self._deal(["past", "present"])
        be = {"past": ("was", "were"), "present": ("is", "are")}[tense][plural]
        rest = self._deal(MOODS) if self._chance(0.6) else self._place(SPOTS)
        return f"{subject} {be} {rest} {self._deal(TIMES[tense]) if self._chance(0.3) else ''}"

    def _existence(self) -> str:
        nouns, looks = self._random.choice([(ANIMALS, LOOKS), (THINGS, LOOKS_OF_THINGS)])
        phrase, plural = self._noun_phrase(nouns, looks)
        be = self._deal(["are", "were"] if plural else ["is", "was"])
        return f"there {be} {phrase} {self._place(SPOTS)}"

    def _relative(self) -> str:
        person, plural = self._noun_phrase(PEOPLE, LOOKS)
        verbs, objects = self._random.choice(ACTIONS)
        noun = objects[self._deal(objects)]
        be = "are" if plural else "is"
        verb = self._verb(verbs, "present", plural)
        return f"{person} who {verb} {noun} {be} {self._deal(MOODS)}"

    def _question(self) -> str:
        verbs, objects = self._random.choice(ACTIONS)
        subject, plural = self._subject()
        if self._chance(0.5):
            auxiliary = self._deal(["did", "will", "do" if plural else "does"])
            return f"{auxiliary} {subject} {self._deal(verbs)} {self._object(objects)}"
        return f"where {'are' if plural else 'is'} {subject}"
