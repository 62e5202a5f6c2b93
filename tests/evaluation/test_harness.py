"""Tasks of lm-evaluation-harness: what our model answers is what the plain model says of whole texts, in float64."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import lm_eval.evaluator  # noqa: F401 - once, before ranks are forked
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from torch import Tensor

from tests.distributed import run_distributed
from tests.parallel.layouts import MODELS, config
from titans_data.tokenize import BytesTokenizer, train_bpe
from titans_dist.config import Config, ConfigError, EvaluationConfig, UserError, validate
from titans_dist.evaluation.driver import check_tasks
from titans_dist.evaluation.harness import tasks as harness
from titans_dist.evaluation.harness.tasks import load_task
from titans_dist.evaluation.ledger import Measured, Row
from titans_dist.evaluation.measure import Material, Measuring, Progress
from titans_dist.evaluation.samples import Samples
from titans_dist.evaluation.summary import lines, metrics
from titans_dist.evaluation.work import Piece, Result, pieces
from titans_dist.model import LanguageModel, build_model

SUITE = Path(__file__).parents[2] / "configs" / "suite" / "commonsense.yaml"
MODEL = dataclasses.replace(MODELS["mag"], vocab_size=320)
WORDS = BytesTokenizer()
END = WORDS.end_of_document
PIECE = 16  # tokens that go through the model at once: less than any text has

CHOICES = [
    {"question": "What do cows drink?", "choices": ["milk", "water", "petrol and oil"], "answer": 1},
    {"question": "Where is up?", "choices": ["above", "below me", "it is there"], "answer": 0},
    {"question": "Two and two?", "choices": ["4", "five", "twenty-two"], "answer": 0},
    {"question": "Who is it?", "choices": ["the postman", "me", "a cat"], "answer": 2},
]
PAGES = [
    {"page": "A first page, which is short.\n"},
    {"page": "A second page that goes on. " * 9 + "é ü 漢字"},
    {"page": "word"},
]
PROMPTS = ["Say something: ", "", "1, 2, 3, "]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model(MODEL, settings().training.seed).double()


def settings(tensor: int = 1) -> Config:
    return config(MODEL, tensor=tensor, sequence=False)


@torch.no_grad()
def logits_of(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Of the token after each, (T, vocab) float64, by one call over all of them."""
    return model(torch.tensor([tokens]))[0]


def encode(text: str) -> list[int]:
    return list(text.encode())


def likelihood(model: LanguageModel, context: str, continuation: str) -> tuple[float, bool]:
    before, after = encode(context) or [END], encode(continuation)
    logits = logits_of(model, before + after)[len(before) - 1 : -1].numpy()
    logs = logits - logits.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    chosen = [logs[position, token] for position, token in enumerate(after)]
    return math.fsum(chosen), [int(row.argmax()) for row in logits] == after


def written(model: LanguageModel, prompt: str, count: int) -> str:
    tokens = encode(prompt) or [END]
    start = len(tokens)
    for _ in range(count):
        token = int(logits_of(model, tokens)[-1, :257].argmax())
        if token == END:
            break
        tokens.append(token)
    return WORDS.decode(tokens[start:])


def last_words(model: LanguageModel) -> list[dict[str, str]]:
    """Texts of which the model guesses every other end: a random model guesses none that is given to it."""
    found: list[dict[str, str]] = []
    number = 0
    while len(found) < 4:
        text, number = f"the story number {number} ends with", number + 1
        guess = int(logits_of(model, encode(text))[-1].argmax())
        if 33 <= guess < 127:
            found.append({"text": text, "end": chr(guess if len(found) % 2 else guess ^ 1)})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> str:
    """Task files with their documents."""
    home = tmp_path_factory.mktemp("tasks")
    options = {"until": ["\n"], "do_sample": False, "max_gen_toks": 6}
    answers = [{"prompt": p, "answer": written(model, p, 6) if i == 0 else "no"} for i, p in enumerate(PROMPTS)]
    write(
        home,
        "choices",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        metadata={"version": 1.5},
    )
    write(
        home,
        "pages",
        PAGES,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    )
    write(
        home,
        "last_word",
        last_words(model),
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{end}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity"}, {"metric": "acc", "aggregation": "mean"}],
    )
    written_by_model = {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"}
    exact = [{"metric": "exact_match"}]
    write(home, "write", answers, **written_by_model, generation_kwargs=options, metric_list=exact)
    write(home, "draw", answers, **written_by_model, generation_kwargs={"do_sample": True, "temperature": 1.0})
    write(home, "bleu", answers, **written_by_model, metric_list=[{"metric": "bleu"}])
    write(home, "unsafe", answers, **written_by_model, metric_list=exact, unsafe_code=True)
    write(home, "nothing", [{"end": ""}], output_type="loglikelihood", doc_to_text="x", doc_to_target="{{end}}")
    write(home, "wrong", answers, output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="{{ 1 / 0 }}")
    write(home, "no_file", [], dataset_kwargs={"data_files": {"test": str(home / "not_there.jsonl")}})
    write(home, "no_hub", [], dataset_path="nobody/no_such_dataset", dataset_kwargs={})
    (home / "group.yaml").write_text(yaml.safe_dump({"group": "all_of_it", "task": ["choices", "pages"]}))
    return str(home)


def write(home: Path, name: str, documents: list[Any], **keys: Any) -> None:
    path = home / f"{name}.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    made = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
    (home / f"{name}.yaml").write_text(yaml.safe_dump({**made, "test_split": "test", **keys}))


def reader(tensor: int = 1) -> Any:
    from titans_dist.parallel import cpu
    from titans_dist.parallel.processes import make_groups
    from titans_dist.parallel.reader import Reader

    made = settings(tensor)
    cpu.install()
    make_groups(made.parallel)
    return Reader(made, torch.device("cpu"), PIECE)


def material(folder: str) -> Material:
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    samples = Samples(Path(folder), {}, WORDS, None)  # type: ignore[arg-type]
    return Material(samples, lambda start, count: torch.zeros(count), 0, task_folder=folder)


def measure(rank: int, world: int, folder: str, asked: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], Any]:
    """Of tasks, their most documents and the tokens of a leg: result and number of legs, each by another worker."""
    model, found = reader(world), {}
    for task, count, leg in asked:
        workers = [Measuring(model, material(folder), leg) for _ in range(2)]
        progress: Progress | Result = Progress()
        legs = 0
        while isinstance(progress, Progress):
            piece = Piece(f"lm/{task}", 0, 7, 0, count)
            progress = workers[legs % 2].advance(piece, pickle.loads(pickle.dumps(progress)))
            legs += 1
        found[task, count, leg] = progress, legs
    return found


TASKS = ("choices", "pages", "last_word", "write")
ALL, WHOLE, SHORT = 100, 10**6, 5  # documents, and tokens of a leg


@pytest.fixture(scope="module")
def measured(folder: str) -> dict[tuple[str, int, int], tuple[Result, int]]:
    asked = [(task, ALL, leg) for task in TASKS for leg in (WHOLE, SHORT)]
    return run_distributed(measure, 1, folder, [*asked, ("choices", 2, WHOLE), ("choices", 4, WHOLE)])[0]


@pytest.fixture(scope="module")
def results(measured: dict[tuple[str, int, int], tuple[Result, int]]) -> dict[str, Result]:
    return {task: measured[task, ALL, WHOLE][0] for task in TASKS}


def value(result: Result, metric: str) -> float:
    return result.detail["metrics"][metric]["value"]


def test_a_choice_is_the_likeliest_continuation(results: dict[str, Result], model: LanguageModel) -> None:
    found = [
        [likelihood(model, f"Question: {d['question']}\nAnswer:", f" {choice}")[0] for choice in d["choices"]]
        for d in CHOICES
    ]
    right = [int(np.argmax(logs) == d["answer"]) for logs, d in zip(found, CHOICES, strict=True)]
    by_length = [
        int(np.argmax([x / len(choice) for x, choice in zip(logs, d["choices"], strict=True)]) == d["answer"])
        for logs, d in zip(found, CHOICES, strict=True)
    ]
    result = results["choices"]
    assert result.scores == right
    assert 0 < sum(right) < len(right)
    assert result.detail["score"] == "acc"
    assert value(result, "acc") == sum(right) / 4
    assert value(result, "acc_norm") == sum(by_length) / 4
    spread = math.sqrt(sum((x - sum(right) / 4) ** 2 for x in right) / 3 / 4)
    assert result.detail["metrics"]["acc"]["stderr"] == pytest.approx(spread)
    assert (result.detail["task_version"], result.detail["shots"], result.detail["documents"]) == (1.5, 0, 4)


def test_a_context_is_read_once_for_all_its_choices(results: dict[str, Result]) -> None:
    result = results["choices"]
    contexts = sum(len(encode(f"Question: {d['question']}\nAnswer:")) for d in CHOICES)  # type: ignore[arg-type]
    assert result.tokens == contexts + sum(len(f" {choice}") for d in CHOICES for choice in d["choices"])  # type: ignore[attr-defined]


def test_whole_texts_are_read_as_documents(results: dict[str, Result], model: LanguageModel) -> None:
    logs = [likelihood(model, "", d["page"])[0] for d in PAGES]
    sizes = [len(d["page"].encode()) for d in PAGES]
    words = sum(len(re.split(r"\s+", d["page"])) for d in PAGES)
    result = results["pages"]
    assert result.detail["score"] == "loss"
    assert result.scores == pytest.approx([-x / n for x, n in zip(logs, sizes, strict=True)], rel=1e-5)
    assert value(result, "word_perplexity") == pytest.approx(math.exp(-sum(logs) / words), rel=1e-4)
    assert value(result, "byte_perplexity") == pytest.approx(math.exp(-sum(logs) / sum(sizes)), rel=1e-5)
    assert value(result, "bits_per_byte") == pytest.approx(-sum(logs) / sum(sizes) / math.log(2), rel=1e-5)
    assert result.detail["metrics"]["bits_per_byte"]["higher_is_better"] is False


def test_the_last_word_counts_where_it_is_the_likeliest(results: dict[str, Result], model: LanguageModel) -> None:
    found = [likelihood(model, d["text"], d["end"]) for d in last_words(model)]
    result = results["last_word"]
    assert result.scores == [float(is_likeliest) for _, is_likeliest in found]
    assert 0 < sum(result.scores) < len(found)
    assert value(result, "perplexity") == pytest.approx(math.exp(-np.mean([x for x, _ in found])), rel=1e-5)
    assert result.detail["metrics"]["perplexity"]["stderr"] > 0


def test_what_is_written_is_the_likeliest_text(results: dict[str, Result]) -> None:
    result = results["write"]
    assert (result.scores, result.detail["score"]) == ([1.0, 0.0, 0.0], "exact_match")


@pytest.mark.parametrize("task", TASKS)
def test_legs_and_workers_change_nothing(task: str, measured: dict[tuple[str, int, int], tuple[Result, int]]) -> None:
    (whole, once), (parts, often) = measured[task, ALL, WHOLE], measured[task, ALL, SHORT]
    assert once == 1 and often >= 3
    assert dataclasses.replace(parts, seconds=0, peak_bytes=0) == dataclasses.replace(whole, seconds=0, peak_bytes=0)


def test_two_processes_that_share_a_copy_answer_the_same(folder: str, results: dict[str, Result]) -> None:
    for found in run_distributed(measure, 2, folder, [(task, ALL, WHOLE) for task in TASKS]):
        for task in TASKS:
            result, _ = found[task, ALL, WHOLE]
            assert result.scores == pytest.approx(results[task].scores, rel=1e-5)
            assert (result.samples, result.tokens) == (results[task].samples, results[task].tokens)


def test_a_limit_takes_the_first_documents(measured: dict[tuple[str, int, int], tuple[Result, int]]) -> None:
    (some, _), (all_of_them, _) = (measured["choices", count, WHOLE] for count in (2, 4))
    assert some.scores == all_of_them.scores[:2]
    assert (some.detail["documents"], some.detail["of"]) == (2, 4)
    assert some.samples != all_of_them.samples
    assert all_of_them.samples == measured["choices", ALL, WHOLE][0].samples


# What the model class does with texts


def asked(rank: int, world: int, what: str, arguments: list[tuple[Any, ...]], words: Any) -> Any:
    from titans_dist.evaluation.harness.model import ReaderLM

    requests = [Instance(what, {}, each, 0, ("x", 0, 1)) for each in arguments]  # type: ignore[arg-type]
    try:
        return getattr(ReaderLM(reader(), words), what)(requests)
    except UserError as error:
        return str(error)


def ask(what: str, *arguments: tuple[Any, ...], words: Any = WORDS) -> Any:
    return run_distributed(asked, 1, what, list(arguments), words)[0]


def test_an_empty_context_is_the_beginning_of_a_document(model: LanguageModel) -> None:
    pairs = [("ab", " cd"), ("", "abc"), ("ab", " ce"), ("", "x")]
    wanted = [likelihood(model, *pair) for pair in pairs]
    assert [x for x, _ in ask("loglikelihood", *pairs)] == pytest.approx([x for x, _ in wanted], rel=1e-5)
    assert ask("loglikelihood_rolling", ("abc",), ("",)) == pytest.approx([wanted[1][0], 0.0], rel=1e-5)


def test_white_space_before_a_continuation_belongs_to_it(model: LanguageModel) -> None:
    ((found, _),) = ask("loglikelihood", ("Answer: ", "yes"))
    assert found == pytest.approx(likelihood(model, "Answer:", " yes")[0], rel=1e-5)


def test_a_token_across_the_border_is_scored_whole(model: LanguageModel) -> None:
    words = train_bpe(["abcabcabc abc abc"] * 9, 300)
    whole, before = words.encode_batch(["x abc", "x ab"])
    shared = int((whole[: len(before)] == before[: len(whole)]).sum())
    assert shared < len(before), "the tokenizer has learned abc"
    tokens = whole.tolist()
    logs = logits_of(model, tokens).log_softmax(-1)
    wanted = sum(logs[i - 1, tokens[i]].item() for i in range(shared, len(tokens)))
    ((found, _),) = ask("loglikelihood", ("x ab", "c"), words=words)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_an_answer_ends_where_the_task_says(model: LanguageModel) -> None:
    text = written(model, "Say something: ", 8)
    options = {"until": [text[3:5], text[6]], "max_gen_toks": 8}
    assert ask("generate_until", ("Say something: ", options)) == [
        text[: min(text.find(text[3:5]), text.find(text[6]))]
    ]
    assert ask("generate_until", ("Say something: ", {"until": "never", "max_gen_toks": 8})) == [text]


def test_nothing_to_score_and_answers_at_random_are_refused() -> None:
    assert "there is nothing to score after 'x'" in ask("loglikelihood", ("x", ""))
    assert "there is nothing to score after ''" in ask("loglikelihood", ("", ""))
    assert "draws its answers at random" in ask("generate_until", ("x", {"do_sample": True, "temperature": 0.7}))


@pytest.mark.parametrize("likelihood", [math.nan, -math.inf])
def test_a_model_that_is_broken_is_no_answer(likelihood: float) -> None:
    from titans_dist.evaluation.harness.model import finite

    with pytest.raises(UserError, match=f"log-likelihood of a text is {likelihood}; its weights are no good"):
        finite(likelihood)


# Tasks that cannot be


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("unsafe", "lm/unsafe runs code that the model has written, which is not done here"),
        ("bleu", "lm/bleu is scored by bleu, which no single document has"),
        ("wrong", "lm/wrong cannot be loaded from .*wrong.yaml .ZeroDivisionError: division by zero.; mend that file"),
        ("no_file", r"lm/no_file needs the dataset json, .* \(Unable to find '.*not_there.jsonl'\); without a network"),
        (
            "no_hub",
            r"lm/no_hub needs the dataset nobody/no_such_dataset, which is neither in the cache of Hugging Face",
        ),
        ("all_of_it", "lm/all_of_it is a group of tasks; name those that are meant, such as lm/choices, lm/pages"),
    ],
)
def test_the_sentence_says_what_is_wrong(
    task: str, sentence: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries for half a minute
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        load_task(f"lm/{task}", folder, 0)
    assert "\n" not in str(error.value)


def test_a_task_that_the_harness_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lm/hellaswagg, which is no task of lm-eval.*; did you mean lm/hellaswag\?"):
        load_task("lm/hellaswagg", None, 0)
    with pytest.raises(ConfigError, match="task_folder=/not/there is no folder"):
        load_task("lm/hellaswag", "/not/there", 0)


# The tasks of the papers' tables, with documents of the published form

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "wikitext": ("loss", {"page": " = A title = \n Some text , of a page . \n"}),
    "lambada_openai": ("acc", {"text": "it was a dark and stormy night"}),
    "piqa": ("acc", {"goal": "How to boil?", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0}),
    "hellaswag": (
        "acc_norm",
        {
            "activity_label": "Cooking",
            "ctx_a": "A man cooks.",
            "ctx_b": "he",
            "endings": ["eats.", "sleeps well.", "runs.", "sings a song."],
            "label": "1",
        },
    ),
    "winogrande": (
        "acc",
        {"sentence": "Ann thanked Bo as _ had helped.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    ),
    "arc_easy": (
        "acc",
        {"question": "What is wet?", "choices": {"text": ["water", "stone"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
    "arc_challenge": (
        "acc_norm",
        {"question": "What is dry?", "choices": {"text": ["rain", "desert"], "label": ["1", "2"]}, "answerKey": "2"},
    ),
    "social_iqa": (
        "acc",
        {
            "context": "Jo ran.",
            "question": "Why?",
            "answerA": "late",
            "answerB": "bored",
            "answerC": "ill",
            "label": "1",
        },
    ),
    "boolq": ("acc", {"passage": "Ice is cold.", "question": "is ice cold", "label": 1}),
}


def published(rank: int, world: int, folder: str) -> dict[str, Result]:
    import datasets

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        documents = datasets.Dataset.from_list([PUBLISHED[task][1]])
        return datasets.DatasetDict(train=documents, validation=documents, test=documents)

    datasets.load_dataset = load
    found: dict[str, Result] = {}
    worker = Measuring(reader(), dataclasses.replace(material(folder), task_folder=None))
    for task in PUBLISHED:
        made = worker.advance(Piece(f"lm/{task}", 0, 7, 0, ALL), Progress())
        assert isinstance(made, Result)
        found[task] = made
    return found


def test_the_published_tasks_are_scored_as_in_the_papers(folder: str, model: LanguageModel) -> None:
    assert [f"lm/{task}" for task in PUBLISHED] == yaml.safe_load(SUITE.read_text())["tasks"]
    harness._index(None)  # takes seconds: once, before ranks are forked
    (found,) = run_distributed(published, 1, folder)
    assert {task: result.detail["score"] for task, result in found.items()} == {
        task: score for task, (score, _) in PUBLISHED.items()
    }
    contexts = ("Ann thanked Bo as Ann", "Ann thanked Bo as Bo")
    ann, bo = (likelihood(model, context, " had helped.")[0] for context in contexts)
    assert found["winogrande"].scores == [float(bo > ann)]
    before = "Cooking: A man cooks. He"
    endings = PUBLISHED["hellaswag"][1]["endings"]
    by_length = [likelihood(model, before, f" {ending}")[0] / len(ending) for ending in endings]
    assert found["hellaswag"].scores == [float(np.argmax(by_length) == 1)]
    read, guess = "it was a dark and stormy", likelihood(model, "it was a dark and stormy", " night")
    assert found["lambada_openai"].tokens == len(read) + len(" night")
    assert found["lambada_openai"].scores == [float(guess[1])]
    assert value(found["lambada_openai"], "perplexity") == pytest.approx(math.exp(-guess[0]), rel=1e-5)


# Beside the other tasks


def test_a_task_of_the_harness_is_one_piece_and_needs_no_length() -> None:
    made = EvaluationConfig(tasks=["passkey", "lm/piqa"], lengths=[64], samples=20, shard=10, seed=3)
    assert pieces(made)[0] == Piece("lm/piqa", 0, 3, 0, 20)
    assert len(pieces(made)) == 3
    assert str(pieces(made)[0]) == "lm/piqa, at most 20 documents"
    validate(dataclasses.replace(settings(), evaluation=EvaluationConfig(tasks=["lm/piqa"])))
    with pytest.raises(ConfigError, match="needs lengths of the context"):
        validate(dataclasses.replace(settings(), evaluation=EvaluationConfig(tasks=["lm/piqa", "passkey"])))


def test_tokens_without_a_text_cannot_be_asked() -> None:
    made = dataclasses.replace(settings(), evaluation=EvaluationConfig(tasks=["lm/piqa"]))
    with pytest.raises(ConfigError, match="lm/piqa asks questions in words, and data=synthetic has no tokenizer"):
        check_tasks(made)


def test_a_loss_has_no_share_and_the_harness_s_own_numbers_stand_beside(results: dict[str, Result]) -> None:
    rows = [
        Row(Measured("c", 1, 1, "m"), Piece(f"lm/{task}", 0, 7, 0, 100), results[task], 0.0)
        for task in ("pages", "choices")
    ]
    loss, share = lines(json_copy(rows))
    assert (loss.is_loss, share.is_loss) == (True, False)
    assert loss.low < loss.mean < loss.high and loss.mean > 1
    assert 0 <= share.low < share.mean < share.high <= 1
    assert [(each.task, each.name, each.documents, each.of) for each in metrics(rows)] == [
        ("lm/pages", "word_perplexity", 3, 3),
        ("lm/pages", "byte_perplexity", 3, 3),
        ("lm/pages", "bits_per_byte", 3, 3),
        ("lm/choices", "acc", 4, 4),
        ("lm/choices", "acc_norm", 4, 4),
    ]


def json_copy(rows: list[Row]) -> list[Row]:
    """As they come out of a ledger."""
    return [
        dataclasses.replace(
            row, result=dataclasses.replace(row.result, detail=json.loads(json.dumps(row.result.detail)))
        )
        for row in rows
    ]
