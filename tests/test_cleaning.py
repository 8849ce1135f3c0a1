"""Cleaning: every rule by name, on what small language models really wrote about COCO's captions."""

from pathlib import Path

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pc_clip.data.wordings import contrast
from pc_clip.write import cleaning, prompts
from pc_clip.write.cleaning import MIN_CHARACTERS, RULES, TRIMS, Given, check, clean, copies
from pc_clip.write.words import content_words, split_by_image, stem

DOG_CAT = "The first image shows a dog on a sofa, while the second shows a cat."
PIZZA = (
    "The first image shows a woman holding a slice of pizza in a kitchen, while the second shows a child eating a "
    "banana at a table."
)
ASKED = prompts.read(prompts.FOLDER / "pairs.yaml")
WORKED = [text for worked in ASKED.examples for text in worked.values()]
ASK = "Say in one or two sentences what looks different in the first image compared with the second image."
SHOWN = Given(examples=tuple(WORKED), instructions=(ASKED.system, ASKED.instruction))


def wrong(cases, function):
    """The cases of a table {input: expected} that come out otherwise; a test asserts that there are none."""
    return [f"{x!r}: {function(x)!r}, not {expected!r}" for x, expected in cases.items() if function(x) != expected]


# -- the sentence and what surrounds it ------------------------------------------------------------------

KEPT = [
    PIZZA,
    DOG_CAT,
    "The first image shows a note on a fridge; the second asks no question at all.",
    "In image 1 a man can’t reach the shelf – in image 2 a café’s cat sleeps.",
    "The first picture shows a man. The second shows a woman with an answer to every question.",
    "The first image shows three dogs on a dog bed, while the second shows a dog and another dog",
    f"Surely {DOG_CAT}",
    f"Okayish as it is, {DOG_CAT}",
    "Great white sharks swim in the first image, while the second image shows a small boat.",
    "In the first image I see a dog on a sofa. I see a cat on a sofa in the second image.",
    "There are two animals: a dog in the first image and a cat in the second image, asleep.",
    "The first image: a dog on a brown sofa. The second image: a cat on the roof of a house.",
    "Good food is on a table in the first image, while the second shows a happy child on a bus.",
    "The first image shows a sign that says: I love you. The second image shows a red door.",
    "The first image shows a dog on a sofa. Let us not forget that the second shows a cat.",
]
TRIMMED = [
    "Sure! {}",
    "Sure thing! {}",
    "Of course, {}",
    "Hello! Happy to help! {}",
    "I can definitely help you with that. {}",
    "I'd be happy to help! Here's a comparison of the two images:\n\n{}",
    "Sure thing! I'd be glad to compare the first image with the second image for you. {}",
    "Certainly. Here is a description of the differences between both images:\n\n{}",
    "No problem, I’ll do my best. Comparison: {}",
    "Here's one way to put it:\n{}",
    "Based on the captions, here is what looks different in the first image:\n\n{}",
    "The main difference between the two images:\n{}",
    "Answer: {}",
    "A: {}",
    '"{}"',
    "{}\nQuestion: What is in the third image?",
    "{}\n\nPicture 1: A plate of food.\nPicture 2: A bus.",
    "{} I hope this helps! If you have other images, I can compare them too.",
    "{} Would you like me to compare other images?",
    "{} You can send me further pictures at any time. Thank you!",
    "{}\nNote: I only know the captions.",
    "{} The second image also has a",
    "Sure, {}\n\nCaption 1: a plate",
    "{} Which of the images do you like?",
]


def test_a_usable_sentence_is_kept_and_its_surroundings_trimmed():
    cases = {text: (text, "kept") for text in KEPT}
    cases |= {text.format(DOG_CAT): (DOG_CAT, "trimmed") for text in TRIMMED}
    assert not wrong(cases, clean)


def test_of_what_six_chat_models_say_around_a_sentence_little_is_left():
    """198 answers. Of those kept aside while the rules were written, 93 of 99 come out as the sentence alone."""
    sentences = [
        "The first image shows a man riding a horse on a beach, while the second image shows two dogs on a sofa.",
        "In the first picture there is a red bus in a street; the second one has a bowl of fruit on a wooden table.",
        "Unlike the second image, where a cat sleeps on a keyboard, the first image shows a child flying a kite.",
    ]
    answers = yaml.safe_load((Path(__file__).parent / "chat_answers.yaml").read_text(encoding="utf-8"))
    alone = {
        half: [
            clean(opening + sentences[n] + texts["endings"][(i + (0, 3, 1)[n]) % 6]).text == sentences[n]
            for texts in models.values()
            for i, opening in enumerate(texts["openings"])
            for n in range(3)
        ]
        for half, models in answers.items()
    }
    assert len(alone["tuned"]) == len(alone["aside"]) == 99
    assert all(alone["tuned"]) and sum(alone["aside"]) >= 93


def test_paragraphs_on_the_images_stay_and_talk_goes():
    cases = {
        "{}\n\nThe second is darker. Let me know!": "{} The second is darker.",
        "{}\n\nBoth images are sharp.\n\nCats are pets.": "{} Both images are sharp.",
        "{}\n\nDogs and cats are pets.\n\nThe first image is old.": "{}",
        "{}\n\nIn the 1920s, the first dogs had a surplus of oil, and cats came later.": "{}",
    }
    cases = {raw.format(DOG_CAT): (text.format(DOG_CAT), "trimmed") for raw, text in cases.items()}
    assert not wrong(cases, clean)


def test_an_answer_that_is_all_talk_is_rejected():
    raws = ["\n\nQuestion: What is it?", "\n\nPicture 1: A dog on a sofa.", "I can help you with that!", "Sure thing!"]
    assert [raw for raw in raws if clean(raw)[0] is not None] == []


TALK = (
    "The first image shows a dog. Sure, sure! Answer: Question: note Note: one two cat, while second larger! image 1: "
    "Here is the difference: okay quickly Let me know please"
)
chunks = st.sampled_from(TALK.split())
gaps = st.sampled_from([" ", "\n", "  ", "\t", "\r\n", "\n\n", "\u00a0"])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(chunks, gaps), min_size=4, max_size=25).map(lambda parts: "".join(w + g for w, g in parts)))
@example("The first image shows a dog.\nThe second\nimage shows\na cat.")
def test_words_never_fuse_nor_change_and_no_space_is_left_over(raw):
    kept, reason = clean(raw)
    if kept is None:
        assert reason not in ("kept", "trimmed")
        return
    assert kept == " ".join(kept.split())
    assert f" {kept} " in f" {' '.join(raw.split())} "
    assert (reason == "kept") == (kept == " ".join(raw.split()))


# -- every rule by its name, with a real example -------------------------------------------------------
# Those about COCO's captions are shortened from what Gemma 3 270M wrote, a base model, with the prompt pairs.yaml; the
# others are the forms in which chat models answer.

BUS = "The first image is a sad expression on a toaster. The second image is a green bus."
BEACH = "The first image shows a man on a horse at the beach."
REAL_TRIMS = {
    "drop_opening": (f"Sure! Here is one difference between the two images: {PIZZA}", PIZZA),
    "drop_next_question": (
        f" {PIZZA}\n\nPicture 1: A person is sitting on a chair.\nPicture 2: A person is sitting on a chair.\n{ASK}\n"
        "Answer: The first image shows a person is sitting on a chair, while the second",
        PIZZA,
    ),
    "drop_other_paragraphs": (
        f"{BEACH}\n\nThe second image shows two dogs.\n\nThese captions were written by different people.\n\n"
        "The first image is better.",
        f"{BEACH} The second image shows two dogs.",
    ),
    "drop_closing": (f"{PIZZA} I hope this helps! Let me know if you have more captions.", PIZZA),
    "drop_list_marks": (f"\n1. {BUS.replace('toaster. ', f'toaster.{chr(10)}2. ')}\n", BUS),
    "join_lines": (BUS.replace("toaster. ", "toaster.\n") + "\nPicture 3: A man is sitting on a chair.", BUS),
    "drop_quotes": (f'"{PIZZA}"', PIZZA),
    "drop_unfinished": (f"{BUS} The first", BUS),
}
STOP = "The first image is a red stop sign.\nThe second image is a large bush with red flowers.\n"
ROOF = "The bus has a {} part of a van."
REAL_BREAKS = {
    "prompt_echo": [
        f"\nPicture 3: A group of people eating a candlelit dinner at a restaurant.\n{ASK}\nAnswer:\nPicture 4: A",
        "The first image shows a close view of food on a plate, while the second image shows a giraffe eating leaves.",
        "The first image shows a large white bus on a city street, while the second image shows a passenger bus.",
        ASK,
        'picture1: A road that has a sign in the windows saying "Stop and see us."\nPicture 2: Car that is lying on',
    ],
    "code": [
        "```python\nprint('The first image shows a dog')\n```",
        "def difference(first, second): the first image is larger",
        '{"first": "a dog on a sofa", "second": "a cat on a chair", "difference": "the first shows a dog"}',
        "import torch and compare the first image with the second image, pixel by pixel, with torch.norm()",
    ],
    "markup": [
        "<answer>The first image shows a dog, the second a cat.</answer>",
        "**First image:** a dog on a sofa in a room. **Second image:** a cat on a chair in a kitchen.",
        "[INST] The first image shows a dog on a sofa, while the second image shows a cat. [/INST]",
        "The first image is at https://example.org and shows a dog, while the second image shows a cat.",
    ],
    "refusal": [
        "As an AI language model, I do not see the first image or the second.",
        "I'm sorry, but I can't compare the first image with the second.",
        "Without the pictures it is not possible to determine what looks different in the first image.",
        "I apologize, but the captions alone do not say what looks different in the first image.",
    ],
    "not_english": [
        "第一张图片显示一只狗在沙发上，而第二张图片显示一只猫在厨房里睡觉。",
        "The first image shows a 狗 on a sofa in a living room, while the second image shows a cat on a chair.",
        "The first image shows a dog on a sofa in a living room, while the second image shows a cat on a chai\ufffd",
    ],
    "repetition": [
        "The first image shows a dog on a dog on a dog on a dog on a dog on a dog on a dog on a",
        f"\n{STOP * 3}The first",
        f"1. The bus has a roof. 2. {ROOF.format('top')} 3. {ROOF.format('bottom')} 4. {ROOF.format('left')}"
        f" 5. {ROOF.format('right')}",
        "".join(f"The image {c} is one of many. " for c in "abcdefghijklmnopq"),
        "The first image shows a very very very large dog in a garden, while the second image shows a cat on a chair.",
    ],
    "same_of_both": [
        "The first image shows a man riding a skateboard in a park, while the second image shows a man riding a "
        "skateboard in a park.",
        "The first image shows a person on field with a Frisbee, while the second image shows a person on a field "
        "with a Frisbee.",
        "Both images show a man and a woman who are posing for a picture in front of a tree.",
    ],
    "too_short": ["A dog.", "Sure!", " The dog is curious about what is behind the camera.\nPicture 3: A dog that is"],
}


def test_every_rule_has_a_real_example():
    assert [trim.__name__ for trim in TRIMS] == list(REAL_TRIMS)
    assert [rule.__name__ for rule in RULES] == list(REAL_BREAKS)


def test_a_rule_trims_what_it_is_named_for(monkeypatch):
    for trim in TRIMS:
        raw, kept = REAL_TRIMS[trim.__name__]
        with monkeypatch.context() as patch:
            assert clean(raw)[0] == trim(kept) == kept
            patch.setattr(cleaning, "TRIMS", [other for other in TRIMS if other is not trim])
            assert clean(raw)[0] != kept, trim.__name__


def test_a_rule_rejects_what_it_is_named_for():
    cases = {raw: (None, name) for name, raws in REAL_BREAKS.items() for raw in raws}
    cases |= {"": (None, "empty"), " \n\t ": (None, "empty")}
    assert not wrong(cases, lambda raw: check(raw, SHOWN))


# -- what must not be rejected -------------------------------------------------------------------------


def test_sentences_that_look_a_little_like_a_broken_rule_are_kept():
    texts = [
        "The first image shows a man on a skateboard, while the second image shows a man on a phone.",
        "The first image shows two dogs asleep on a bed, while the second image shows one dog asleep on a bed.",
        "The first image shows a dog on top of a cat, while the second image shows a cat on top of a dog.",
        "The first image shows a red car; the second image shows a red car that is parked beside a house.",
        "The first image shows a man with a café’s cup & saucer, while the second image shows a 50% off sign.",
        "The first image shows men in suits. In the first image one smiles. The second image shows dogs. In the second "
        "image one sleeps. Overall, the first image is of people and the second image is of animals.",
        "The main difference between the two images is that the first shows a bus at night and the second a dog.",
        "What looks different in the first image compared with the second image is that a brown dog sleeps on a carpet "
        "there, beside a fire, while cats run about on the roof of the second.",  # begins with words of the question
    ]
    assert not wrong({text: (text, "kept") for text in texts}, lambda text: check(text, SHOWN))


def test_words_of_an_example_are_fine_if_the_captions_have_them():
    plate = (
        "The first image shows a close view of food on a plate, while the second image shows two giraffes at a table."
    )
    of_food = ("A close up view of some food on a large plate.", "Two giraffes.")
    assert check(plate, SHOWN._replace(captions=of_food)) == (plate, "kept")
    split = ("A close view of a giraffe.", "Food on a plate.")  # together they have the words; neither says it
    assert check(plate, SHOWN._replace(captions=split)) == (None, "prompt_echo")
    assert clean(plate) == (plate, "kept"), "nothing is known to copy from"
    assert not copies("The first image shows a close view of the polar bears.", WORKED)
    assert copies("A close, close view of foods on plates!", WORKED)
    assert not copies("food on a plate, a close view", WORKED)


def test_how_short_is_too_short_can_be_said():
    ring = "The first image shows a ring, while the second shows a star."
    assert len(ring) == MIN_CHARACTERS
    assert clean(ring) == (ring, "kept")
    assert clean(ring.replace("star", "ox")) == (None, "too_short")
    assert clean(ring, min_characters=61) == (None, "too_short")
    assert clean("a small red circle on a grey background", min_characters=20)[1] == "kept"


def test_newlines_become_spaces_which_is_no_trim():
    assert clean(f"\n{DOG_CAT.replace(' while', chr(10) + 'while')}\n") == (DOG_CAT, "kept")


# -- what is said of which image -----------------------------------------------------------------------


def test_words_belong_to_the_image_they_are_said_of():
    texts = [
        *(contrast("a dog", "two cats", wording) for wording in range(4)),
        "A dog in the first image, two cats in the second.",
        "A dog in the first image and two cats in the second image.",
        "The first image shows a dog and the second shows two cats.",
        "Image 1 shows a dog; image 2 shows two cats.",
        "Unlike the second image, which has two cats, the first image has a dog.",
        "What looks different is that the first image has a dog and the second image has two cats.",
        "The difference between the first and second images is that the first has a dog, the second has two cats.",
        "In the first image, there is a dog. In the second image, there are two cats.",
    ]
    cases = {text: (["dog"], ["two", "cat"]) for text in texts} | {
        "The first image shows a dog, a cat and a man at second base.": (["dog", "cat", "man", "at", "bas"], []),
        "Both images show a dog, while the second is larger.": (["dog"], ["dog", "larger"]),
        "The first and the second image show a dog.": (["dog"], ["dog"]),
        "Two dogs.": ([], []),
        "": ([], []),
    }
    assert not wrong(cases, split_by_image)


def test_words_are_compared_without_their_endings_and_different_ones_stay_apart():
    forms = ["dog dogs", "ride rides riding", "city cities", "stop stops stopped stopping", "glass glasses"]
    assert [words for words in forms if len(set(map(stem, words.split()))) > 1] == []
    words = ["bus", "bush", "red", "ring", "sing", "sea", "see", "cat", "car", "grass", "bed", "bear", "beer", "is"]
    assert len({stem(word) for word in words}) == len(words)
    assert content_words("The first image shows a dog's bed on a sofa.") == ["dog", "bed", "sofa"]
