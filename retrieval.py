"""Retrieval from long texts, a small set of tasks in the manner of RULER (Hsieh et al., 2024):

    one needle          a sentence with a keyword's number in a long text, at one of five depths; the
                        prompt ends where the number has to be repeated
    several needles     four such sentences of other keywords and numbers, anywhere; one is asked for
    variable tracking   VAR ABC = 12345 ... VAR DEF = VAR ABC ... VAR GHJ = VAR DEF, anywhere in this
                        order; all variables that are 12345 have to be named

Differs: RULER's prompts are for chat models, and its answers are looked for anywhere in generated text,
variables one by one. Here the greedy continuation has to begin with the whole answer, and a chain has
two steps instead of four. evaluate.py --retrieval measures models with it.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

ONE, SEVERAL, VARIABLES = TASKS = ("one needle", "several needles", "variable tracking")
DEPTHS = (0, 25, 50, 75, 100)  # percent of the text that stand before the needle
KEYWORDS = ("anchor apple basket bridge candle castle copper dragon engine falcon garden hammer island "
            "jacket kettle ladder marble needle orange pepper pillow rocket saddle silver tunnel turtle "
            "velvet violin walnut window").split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
ENOUGH = 0.8  # of the examples, for a teacher whose students are to be measured


@dataclass
class Case:
    """What an example says."""

    intro: str
    sentences: list[tuple[float, str]]  # in this order; where each belongs, as a share of the text
    question: str
    answer: str


@dataclass
class Examples:
    """Prompts with their answers at the end, all of one length."""

    tasks: list[tuple[str, int | None]]  # of each: one of TASKS, and of one needle its depth
    tokens: Tensor  # (n, length), int64
    n_answer: Tensor  # (n,), int64: how many tokens at the end are the answer


def make_examples(tokenizer, text: Tensor, length: int, n: int) -> Examples:
    """n examples of each task and depth, the same ones in each call; text: token ids (n_tokens,) that
    the long texts are cut from.

    Raises ValueError if there are too few of them, or if `length` leaves no room beside the sentences.
    """
    maker, tasks, made = Maker(tokenizer, text, length), [], []
    for task, depth in [*((ONE, depth) for depth in DEPTHS), (SEVERAL, None), (VARIABLES, None)]:
        for i in range(n):
            rng = random.Random(f"{length}, {task}, {depth}, {i}")
            case = (needles(rng, 1, depth) if task == ONE else needles(rng, 4) if task == SEVERAL
                    else variable_tracking(rng))
            tasks.append((task, depth))
            made.append(maker.example(case, rng))
    tokens, n_answer = zip(*made)
    return Examples(tasks, torch.stack(tokens), torch.tensor(n_answer))


class Maker:
    """Of examples of one length."""

    def __init__(self, tokenizer, text: Tensor, length: int):
        self.tokenizer, self.text, self.length = tokenizer, text, length
        plain, special = self.ids("The"), tokenizer("The").input_ids
        self.begin = special[: special.index(plain[0])]  # what the tokenizer puts before every text
        ends = [i for token, i in tokenizer.get_vocab().items() if token.startswith((".", "!", "?"))]
        self.ends = torch.tensor(ends)  # tokens that end a sentence

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def example(self, case: Case, rng: random.Random) -> tuple[Tensor, int]:
        """Token ids (length,) that end with the answer, and how many of them it has."""
        before, asked = self.begin + self.ids(case.intro), self.ids(case.question)
        ending = self.ids(case.question + case.answer)
        inserted = [(share, torch.tensor(self.ids(text))) for share, text in case.sentences]
        n = self.length - len(before) - len(ending) - sum(len(ids) for _, ids in inserted)
        if n < 1:
            raise ValueError(f"expected at least {self.length - n + 1} tokens, got {self.length}")
        text, parts, start = self.haystack(n, rng), [torch.tensor(before)], 0
        for share, ids in inserted:
            end = self.place(text, share)
            parts += [text[start:end], ids]
            start = end
        parts += [text[start:], torch.tensor(ending)]
        # a tokenizer may join the question's end and the answer's beginning: then both are the answer
        n_asked = next((i for i, (a, b) in enumerate(zip(asked, ending)) if a != b), len(asked))
        return torch.cat([part.long() for part in parts]), len(ending) - n_asked

    def haystack(self, n: int, rng: random.Random) -> Tensor:
        """n tokens of the text, from anywhere."""
        if n > len(self.text):
            raise ValueError(f"expected a text of at least {n} tokens to hide sentences in, got "
                             f"{len(self.text)} for examples of {self.length}")
        start = rng.randrange(len(self.text) - n + 1)
        return self.text[start : start + n]

    def place(self, text: Tensor, share: float) -> int:
        """Between two sentences if any end is near: how many tokens of the text stand before it."""
        wanted = round(share * len(text))
        places = torch.isin(text, self.ends).nonzero().flatten() + 1
        places = places[(places - wanted).abs() <= len(text) // 10]
        if share in (0, 1) or not len(places):
            return wanted
        return int(places[(places - wanted).abs().argmin()])


def needles(rng: random.Random, n: int, depth: int | None = None) -> Case:
    """One needle at a depth in percent, or n of them anywhere."""
    keywords, numbers = rng.sample(KEYWORDS, n), rng.sample(range(10**6, 10**7), n)
    shares = sorted(rng.random() for _ in keywords) if depth is None else [depth / 100]
    asked = rng.randrange(n)
    sentences = [f" The special magic number for {keyword} is {number}."
                 for keyword, number in zip(keywords, numbers)]
    return Case(intro="Special magic numbers are hidden in the following text. Remember them.\n\n",
                sentences=list(zip(shares, sentences)),
                question=f"\n\nThe special magic number for {keywords[asked]} is",
                answer=f" {numbers[asked]}")


def variable_tracking(rng: random.Random) -> Case:
    number, letters = rng.randrange(10**4, 10**5), "".join(rng.sample(LETTERS, 9))
    names = [letters[:3], letters[3:6], letters[6:]]
    values = [number, *(f"VAR {name}" for name in names)]
    shares = sorted(rng.random() for _ in names)
    return Case(intro="Variables are assigned in the following text. Remember them.\n\n",
                sentences=[(share, f" VAR {name} = {value}.")
                           for share, name, value in zip(shares, names, values)],
                question=f"\n\nThe variables with the value {number} are, in this order: VAR",
                answer=" " + ", VAR ".join(names))


@torch.no_grad()
def is_solved(model, tokens: Tensor, n_answer: Tensor) -> Tensor:
    """Whether greedy decoding of each prompt begins with its answer: bool (B,), of tokens (B, T) on the
    model's device, which end with the answers, and their lengths n_answer (B,).

    Nothing is generated. Decoding gives the answer's first token if that is the likeliest after the
    prompt, then its second if that is the likeliest after prompt and first, and so on: one pass over
    prompt and answer tells all of them.
    """
    most = int(n_answer.max())
    logits = model(tokens, use_cache=False, logits_to_keep=most + 1).logits
    right = logits[:, :-1].argmax(-1) == tokens[:, -most:]  # (B, most)
    is_prompt = torch.arange(most, 0, -1, device=tokens.device) > n_answer[:, None]
    return (right | is_prompt).all(1)


def shares(examples: Examples, solved: Tensor) -> list[dict]:
    """The share of each task's examples that are solved, bool (n,); of one needle by depth, too."""
    length, solved = examples.tokens.shape[1], solved.tolist()

    def share(*labels) -> float:
        mine = [x for label, x in zip(examples.tasks, solved) if label in labels]
        return sum(mine) / len(mine)

    by_depth = [dict(depth=depth, found=share((ONE, depth))) for depth in DEPTHS]
    one = dict(found=share(*((ONE, depth) for depth in DEPTHS)), by_depth=by_depth)
    several, variables = (dict(found=share((task, None))) for task in (SEVERAL, VARIABLES))
    return [dict(task=task, length=length) | of_task
            for task, of_task in zip(TASKS, (one, several, variables))]


# -- tables ----------------------------------------------------------------------------------------


def print_tables(rows: dict[str, dict]) -> None:
    """rows: name of a model -> dict(retrieval=all that `shares` gave)."""
    found = {name: row["retrieval"] for name, row in rows.items()}
    for task in TASKS:
        print_table(task, {name: [share for share in mine if share["task"] == task]
                           for name, mine in found.items()}, "length", "{:,}")
    for i, share in enumerate(found["teacher"]):
        if share["task"] == ONE:
            print_table(f"at {share['length']:,}, depth", {name: mine[i]["by_depth"]
                        for name, mine in found.items()}, "depth", "{} %")
    print(f"\n* the teacher itself finds less than {ENOUGH:.0%}: this says little of its students")


def print_table(title: str, rows: dict[str, list[dict]], field: str, form: str) -> None:
    columns = [form.format(x[field]) + " *" * (x["found"] < ENOUGH) for x in rows["teacher"]]
    width = max(18, *map(len, rows))
    print(f"\n{title:{width}} " + " ".join(f"{column:>9}" for column in columns))
    for name, shares in rows.items():
        print(f"{name:{width}} " + " ".join(f"{x['found']:9.0%}" for x in shares))
