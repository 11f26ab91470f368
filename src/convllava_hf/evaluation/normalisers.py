"""Free-text answers as the VQA benchmarks compare them: two normalisers that are alike, but not the same."""

import re


NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
ARTICLES = {"a", "an", "the"}
# In the order of the originals, which matters to none of them.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The first group of the originals' pattern was meant to look behind, and matches everywhere.
PERIOD = re.compile(r"\.(?!\d)")
# They pass `re.UNICODE` where the number of substitutions belongs.
MOST_PERIODS = int(re.UNICODE)
# Words whose apostrophe an answer may lack. Of several apostrophes exactly one is restored.
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# The tables of the originals hold one entry the wrong way round.
RESTORED = {"somebody'd": "somebodyd"}
for word in CONTRACTIONS.split():
    for place in (match.start() for match in re.finditer("'", word)):
        RESTORED[word[:place] + word[place + 1 :]] = word


def normalise_vqa(text: str) -> str:
    """An answer as TextVQA, VQAv2 and VizWiz compare it.

    Source: haotian-liu/LLaVA, `llava/eval/m4c_evaluator.py`, `EvalAIAnswerProcessor`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_multimodal_ocr(text)


def normalise_multimodal_ocr(text: str) -> str:
    """An answer as MultimodalOCR compares it. Commas are punctuation like any other here, and "'s" stays.

    Source: Yuliang-Liu/MultimodalOCR, `eval.py`, `VQAEval`.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    touched, joined = text, COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in touched or f" {mark}" in touched
        text = text.replace(mark, "" if beside_space or joined else " ")
    text = PERIOD.sub("", text, count=MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(RESTORED.get(word, word) for word in words if word not in ARTICLES)
