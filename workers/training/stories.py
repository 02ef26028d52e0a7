"""Short and long stories from templates.

Half of the stories about a known subject are always the same one, so that the model has something definite to learn by heart; the others
vary, so that sampling gives variety and unknown subjects work too.
"""

from __future__ import annotations

import random

from workers.training.words import ADJECTIVES, ANIMALS, NAMES, NOUNS, PEOPLE, THINGS, invented_word, with_article

SUBJECTS = (*ANIMALS, *PEOPLE, *THINGS)

_PLACES = {
    "lighthouse": "on a cliff above the sea",
    "fox": "at the edge of a quiet forest",
    "owl": "in a hollow oak",
    "bear": "in a cave under the mountain",
    "whale": "in the deep blue ocean",
    "robot": "in a workshop full of tools",
    "computer": "in the corner of a busy office",
    "queue": "in the middle of a busy town",
    "train": "at a small station in the hills",
    "bridge": "over a wide and rapid river",
    "ship": "in a harbor full of boats",
    "boat": "in a harbor full of boats",
    "rocket": "on a field outside the town",
    "star": "high above the sleeping village",
    "library": "behind the old market",
    "penguin": "on an island of snow and ice",
    "king": "in a castle on a hill",
    "sailor": "in a house beside the harbor",
    "baker": "in a warm shop on the corner",
}
_HABITS = {
    "lighthouse": "sent its light over the dark waves",
    "clock": "told the time to the whole street",
    "robot": "sorted screws and hummed a little song",
    "computer": "counted numbers until late at night",
    "queue": "kept every task in order and lost none of them",
    "train": "carried letters from village to village",
    "bridge": "held up everyone who wanted to cross",
    "river": "sang to the stones on its way to the sea",
    "star": "winked at the children below",
    "library": "opened its doors to anyone with a question",
    "baker": "made bread before the sun came up",
    "king": "listened to the people of the valley",
    "sailor": "told the children about distant islands",
    "fox": "walked along the river and looked for something new",
    "owl": "watched the moon and learned the names of the stars",
}
_ANY_PLACES = (
    "near a small village",
    "in a green valley",
    "at the end of a long road",
    "beside a quiet lake",
    "behind the tall hills",
    "in a town by the sea",
)
_BEING_HABITS = (
    "walked to the river and talked to the birds",
    "looked for something new to learn",
    "helped the neighbors with their work",
    "sat by the window and dreamed of the sea",
    "collected smooth stones and bright feathers",
)
_THING_HABITS = (
    "stood quietly and watched the world go by",
    "waited for someone to come along",
    "listened to the wind and the rain",
    "made the people of the village smile",
)
_OPENINGS = (
    "Once upon a time there was {a} {place}.",
    "There was once {a} {place}.",
    "Long ago there was {a} {place}.",
    "Not so long ago there was {a} {place}.",
)
_EVENTS = (
    "One night a great storm came, and a small boat lost its way.",
    "One day a child came by and could not find the way home.",
    "One winter the snow fell so deep that nobody could open a door.",
    "One morning the river rose and carried the old bridge away.",
    "One evening all the lamps in the village went out.",
    "One day a letter came that nobody could read.",
    "One summer the rain stayed away and the wells ran dry.",
    "One night a thief took the silver bell from the tower.",
)
_FEARS = (
    "Everyone was afraid, but {the} stayed calm.",
    "{The} felt very small, but did not run away.",
    "At first {the} did not know what to do.",
    "{The} thought about it for a long time.",
)
_DEEDS = (
    "{The} worked through the whole night and never rested.",
    "{The} called for help, and friends came from every side.",
    "With a little patience and a clever idea, {the} found a way.",
    "Step by step {the} did what had to be done.",
    "{The} remembered an old song and followed it to the answer.",
)
_REWARDS = (
    "In the morning everyone was safe.",
    "Before the sun came up, all was well again.",
    "By the next day everything was in its place.",
    "Soon the whole village heard the good news.",
)
_CLOSINGS = (
    "From that day on nobody forgot how brave {the} was.",
    "And {the} was happy, because small things can matter a lot.",
    "Since then people come from far away to say thank you.",
    "And if you listen on a quiet night, you can still hear them tell this story.",
)
_JOURNEYS = (
    "The next day {the} set out with a map, a lantern and a piece of bread. The path went through the forest and over three hills. "
    "Behind the last hill there was a valley that was not on the map.",
    "Then {the} met {friend}, who was looking for the way to the sea. They decided to go together. "
    "The road is shorter when there is someone to talk to.",
    "On the second day they came to a wide river. There was no bridge, so they built a raft from old wood and rope. "
    "It was slow, but it held.",
    "In the evening they found a house with a red door. An old woman gave them soup and told them about a hidden garden. "
    '"Only those who are patient can find it," she said.',
    "At night the wind grew cold and the stars were hidden. {The} lit the lantern and waited. "
    "In the first light of the morning the path was there again.",
    "After a week they came to a tower without a door. {Friend} wanted to turn back, but {the} counted the stones. "
    "The ninth stone was loose, and behind it was a key.",
)
_LONG_ENDINGS = (
    "At last they stood in the hidden garden. It was smaller than they had thought, but every flower had its own color. "
    "They took one seed each and went home.",
    "When they came home, everyone wanted to hear what had happened. {The} told the story from the beginning to the end, "
    "and nobody fell asleep.",
    "The way home was easy, because they knew every stone. The village had a feast, and the lamps burned until morning.",
)


def story(rng: random.Random, subject: str | None = None, long: bool = False, companion: str | None = None) -> str:
    """A story about `subject` (a noun without article; None picks one), perhaps with a friend.

    Short ones have about 80 words, long ones 150 to 300.
    """
    subject = subject or rng.choice(SUBJECTS)
    if subject in SUBJECTS and not companion and rng.random() < 0.5:
        rng = random.Random(f"{subject}:{long}")
    fill = _names(rng, subject, companion)
    introduction = f" {{The}} had a good friend, {with_article(companion)}." if companion else ""
    paragraphs = _long(rng, subject, introduction) if long else [_short(rng, subject, introduction)]
    return "\n\n".join(paragraph.format(**fill) for paragraph in paragraphs)


def any_subject(rng: random.Random) -> str:
    """Mostly a subject with stories of its own, sometimes any noun, sometimes a word that does not exist."""
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(SUBJECTS)
    if kind < 0.85:
        return rng.choice(NOUNS)
    return invented_word(rng)


def _names(rng: random.Random, subject: str, companion: str | None) -> dict[str, str]:
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.7 else "small"
    called = f" named {rng.choice(NAMES)}" if subject in ANIMALS and rng.random() < 0.6 else ""
    friend = f"the {companion or rng.choice([animal for animal in ANIMALS if animal != subject])}"
    return {
        "a": with_article(f"{adjective} {subject}") + called,
        "the": f"the {subject}",
        "The": f"The {subject}",
        "friend": friend,
        "Friend": friend[0].upper() + friend[1:],
        "place": _PLACES.get(subject) or rng.choice(_ANY_PLACES),
    }


def _opening(rng: random.Random, subject: str) -> str:
    alive = subject in ANIMALS or subject in PEOPLE
    habit = _HABITS.get(subject) or rng.choice(_BEING_HABITS if alive else _THING_HABITS)
    return f"{rng.choice(_OPENINGS)} Every {rng.choice(('day', 'night', 'morning', 'evening'))} {{the}} {habit}."


def _short(rng: random.Random, subject: str, introduction: str) -> str:
    parts = [_opening(rng, subject) + introduction]
    parts += [rng.choice(options) for options in (_EVENTS, _FEARS, _DEEDS, _REWARDS, _CLOSINGS)]
    return " ".join(parts)


def _long(rng: random.Random, subject: str, introduction: str) -> list[str]:
    first = " ".join((_opening(rng, subject) + introduction, rng.choice(_EVENTS), rng.choice(_FEARS)))
    middle = rng.sample(_JOURNEYS, rng.randint(1, 4))
    last = " ".join(rng.choice(options) for options in (_LONG_ENDINGS, _DEEDS, _CLOSINGS))
    return [first, *middle, last]
