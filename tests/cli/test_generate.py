"""`l2d generate`: what goes in and comes out, and what is refused before any weights are loaded."""

import json
import os
import re
import resource
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusion_models import NETWORK, SPACE
from tiny_models import tiny_lm, tiny_tokenizer
from typer.testing import CliRunner

from l2d_framework.cli import app
from l2d_framework.cli.answer_file import AnswerFile
from l2d_framework.cli.common import check_device
from l2d_framework.cli.watching import Drafts, Printer, Watch
from l2d_framework.config import parse_run
from l2d_framework.diffusion.ode import Evaluation
from l2d_framework.errors import BusyError, ConfigError, L2DError, OutputError
from l2d_framework.generation.prompts import pad_left
from l2d_framework.models import checkpoint
from l2d_framework.models.checkpoint import build_model, load, save

FAST = ("--max-new-tokens", "4", "--num-inference-steps", "3")


def write(folder, *, chat=True, classes=("math", "code")):
    """A checkpoint whose answers are letters, so that they can be printed and compared."""
    lm, tokenizer = tiny_lm(), tiny_tokenizer(chat=chat)
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    lm.generation_config.suppress_tokens = sorted(set(range(lm.config.vocab_size)) - set(letters))
    lm.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    run = {
        "model": {"base": str(folder / "base")},
        "schedule": {"name": "linear"},
        "parametrization": {"name": "embedding", **SPACE},
        "backbone": {"name": "two_stream", "num_classes": len(classes), **NETWORK},
        "classes": list(classes),
    }
    model = build_model(parse_run(run))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.own_parameters().values():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    save(model, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def lm(model):
    return load(model)


def run(*arguments, **options):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], **options)


def lines(*arguments, **options):
    found = run(*arguments, **options)
    assert found.exit_code == 0, found.exception
    return [line for line in found.stdout.splitlines() if line and not line.startswith("==> ")]


def texts(lm, prompts, **options):
    encoded = pad_left([lm.tokenizer(prompt)["input_ids"] for prompt in prompts])
    found = lm.generate(encoded, max_new_tokens=4, num_inference_steps=3, **options)
    return [
        lm.tokenizer.decode(a[:n], skip_special_tokens=True) for a, n in zip(found.answers, found.lengths, strict=True)
    ]


def test_each_prompt_is_answered_on_a_line_of_its_own(model, lm):
    found = lines(model, "--prompt", "Hello", "--prompt", "Another one", *FAST)
    assert found == texts(lm, ["Hello", "Another one"])
    assert len(set(found)) == 2


def test_prompts_come_from_a_file_of_text_or_json_lines(model, lm, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello\n\nAnother one\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello", "id": 3}\n{"prompt": "Another one"}\n')
    wanted = texts(lm, ["Hello", "Another one"])
    assert lines(model, "--file", tmp_path / "prompts.txt", *FAST) == wanted
    assert lines(model, "--file", tmp_path / "prompts.jsonl", *FAST) == wanted
    assert lines(model, "--prompt", "Hello", "--file", tmp_path / "prompts.txt", *FAST)[0] == wanted[0]


def test_the_size_of_a_batch_does_not_change_an_answer(model, tmp_path):
    prompts = ["Hello", "Another one", "Hello", "A third, longer prompt", "Hello"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    how = ("--file", tmp_path / "prompts.txt", *FAST, "--do-sample", "--num-return-sequences", "2")
    wanted = lines(model, *how, "--batch-size", "5")
    assert len(wanted) == 10
    # Equal prompts differ by their number in the file, not in the batch.
    assert len({wanted[0], wanted[4], wanted[8]}) > 1
    for size in (1, 2):
        assert lines(model, *how, "--batch-size", size) == wanted


def test_options_of_sampling_are_those_of_the_python_interface(model, lm):
    ask = (model, "--prompt", "Hello", "--prompt", "Another one", "--max-new-tokens", "4")
    for arguments, options in [
        (("--num-inference-steps", "0"), {"num_inference_steps": 0}),
        (
            ("--num-inference-steps", "4", "--solver", "euler", "--seed", "3"),
            {"num_inference_steps": 4, "solver": "euler", "seed": 3},
        ),
        (
            ("--num-inference-steps", "3", "--class", "code", "--guidance-scale", "2.5"),
            {"num_inference_steps": 3, "classes": ["code", "code"], "guidance_scale": 2.5},
        ),
        (
            ("--num-inference-steps", "3", "--set", "estimate.mode=argmax", "--set", "end_time=0.5"),
            {"num_inference_steps": 3, "estimate": {"mode": "argmax"}, "end_time": 0.5},
        ),
        (("--preset", "l2d-release"), {"preset": "l2d-release"}),
        (
            ("--num-inference-steps", "3", "--do-sample", "--temperature", "2", "--top-k", "5", "--seed", "1"),
            {"num_inference_steps": 3, "do_sample": True, "temperature": 2.0, "top_k": 5, "seed": 1},
        ),
    ]:
        encoded = pad_left([lm.tokenizer(prompt)["input_ids"] for prompt in ("Hello", "Another one")])
        found = lm.generate(encoded, max_new_tokens=4, **options)
        wanted = [lm.tokenizer.decode(answer, skip_special_tokens=True) for answer in found.answers]
        assert lines(*ask, *arguments) == wanted, arguments


@pytest.mark.parametrize(
    "way",
    [["--merge", "never"], ["--merge", "always"], ["--speculate", "2", "--drafter", "prompt_lookup"], ["--no-graph"]],
)
def test_how_it_is_run_changes_no_answer(model, way):
    how = (model, "--prompt", "Hello", *FAST)
    assert lines(*how, *way) == lines(*how)


def test_a_drafter_may_be_given_with_its_options(model):
    how = (model, "--prompt", "Hello", *FAST)
    section = f"{{name: assistant, model: '{model.parent / 'base'}'}}"
    assert lines(*how, "--speculate", "2", "--drafter", section) == lines(*how)


def test_answers_are_cut_at_a_stop_string(model):
    how = (model, "--prompt", "Hello", "--max-new-tokens", "8", "--num-inference-steps", "3")
    (text,) = lines(*how)
    stop = text[3]
    assert lines(*how, "--stop", stop, "--stop", "unlikely") == [text[: text.index(stop)]]


def test_a_conversation_is_rendered_by_the_chat_template(model, lm, tmp_path):
    def ask(messages):
        return lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    user = [{"role": "user", "content": "Hello"}]
    longer = [*user, {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Really"}]
    (tmp_path / "talks.jsonl").write_text(
        json.dumps({"messages": longer}) + "\n" + json.dumps({"messages": user}) + "\n"
    )
    assert lines(model, "--chat", "--prompt", "Hello", *FAST) == texts(lm, [ask(user)])
    assert lines(model, "--file", tmp_path / "talks.jsonl", *FAST) == texts(lm, [ask(longer), ask(user)])


def test_a_talk_on_the_terminal_remembers_what_was_said(model, lm):
    found = run(model, "--chat", *FAST, input="Hello\n\n \nReally\n")  # an empty line ends nothing
    assert found.exit_code == 0
    messages, answers = [], []
    for line in ("Hello", "Really"):
        messages.append({"role": "user", "content": line})
        answers += texts(lm, [lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)])
        messages.append({"role": "assistant", "content": answers[-1]})
    assert "Ctrl-D ends it" in found.stderr
    printed = found.stdout.replace("> ", "").split()
    assert [text for text in printed if text in answers] == answers


@pytest.mark.parametrize(("formats", "warns"), [(["prompt_response", "text"], True), (["text", "messages"], False)])
def test_a_chat_with_a_model_that_saw_none_is_warned_of(model, tmp_path, formats, warns):
    shutil.copytree(model, tmp_path / "model")
    run_json = {"data": {"sources": {"train": [{"format": name} for name in formats]}}}
    (tmp_path / "model" / "run.json").write_text(json.dumps(run_json))
    for chat, is_warned in ((["--chat"], warns), ([], False)):
        found = run(tmp_path / "model", "--prompt", "Hello", *chat, *FAST)
        assert found.exit_code == 0
        assert ("was not trained on conversations, but on data of the format prompt" in found.stderr) == is_warned


def test_an_empty_answer_in_a_talk_says_so(model):
    (first, *_) = lines(model, "--chat", "--prompt", "Hello", *FAST)[0]
    found = run(model, "--chat", *FAST, "--stop", first, input="Hello\n")
    assert found.exit_code == 0
    assert "The answer is empty." in found.stderr


@pytest.mark.parametrize(
    ("arguments", "streams"),
    [
        ((), True),
        (("--no-stream",), False),
        (("--num-return-sequences", "2"), False),
        (("--prompt", "Another one"), False),
    ],
)
def test_a_single_answer_comes_token_by_token_on_a_terminal(model, monkeypatch, arguments, streams):
    asked = (model, "--prompt", "Hello", *FAST, *arguments)
    printed = []
    put = Printer.put
    monkeypatch.setattr(Printer, "put", lambda printer, value: (printed.append(value), put(printer, value)))
    elsewhere = run(*asked).stdout
    assert not printed
    with monkeypatch.context() as patched:
        terminal = SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True))
        patched.setattr("l2d_framework.cli.generate.sys", terminal)
        assert run(*asked).stdout == elsewhere
    assert bool(printed) == streams


def test_answers_that_are_known_are_shown_when_no_more_are_waited_for(model, lm, monkeypatch):
    finish, asked = Watch.finish, (model, "--prompt", "Hello", "--prompt", "Another one", *FAST, "--batch-size", "1")

    def stop(watch, prompts):
        finish(watch, prompts)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Watch, "finish", stop)
    found = run(*asked)
    assert found.exit_code == 130
    assert found.stdout == f"==> Prompt 0 <==\n{texts(lm, ['Hello'])[0]}\n"
    assert "1 of 2 are answered. --out FILE would keep them." in found.stderr


def test_several_answers_stand_below_whose_they_are_and_a_single_one_alone(model, lm, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello\n\nAnother one\n")
    first, second = texts(lm, ["Hello", "Another one"])
    assert run(model, "--prompt", "Hello", *FAST).stdout == f"{first}\n"
    where = tmp_path / "prompts.txt"
    assert run(model, "--file", where, *FAST).stdout == f"==> {where}:1 <==\n{first}\n\n==> {where}:3 <==\n{second}\n"
    a, b = texts(lm, ["Hello"], num_return_sequences=2)
    several = run(model, "--prompt", "Hello", *FAST, "--num-return-sequences", 2).stdout
    assert several == f"==> Prompt 0, answer 1 of 2 <==\n{a}\n\n==> Prompt 0, answer 2 of 2 <==\n{b}\n"


def test_what_is_streamed_or_traced_is_the_answer(model, tmp_path):
    asked = (model, "--prompt", "Hello", "--max-new-tokens", "12", "--num-inference-steps", "3")
    stop = lines(*asked)[0][7]
    asked += ("--stop", stop)
    rows, traces = [], []
    for number, how in enumerate([(), ("--stream",), ("--trace",), ("--stream", "--trace")]):
        page = tmp_path / f"{number}.html"
        shown = run(*asked, *how, *([page] if "--trace" in how else []), "--out", tmp_path / f"{number}.jsonl")
        assert shown.exit_code == 0, shown.exception
        rows.append(json.loads((tmp_path / f"{number}.jsonl").read_text()))
        traces += [page.read_text()] if page.exists() else []
        assert shown.stdout == rows[0]["answers"][0]["text"] + "\n"
    assert rows == [rows[0]] * 4
    assert traces == [traces[0]] * 2


@pytest.mark.parametrize("stops", [(), ("mb", "wort"), ("Ende",)])
def test_what_is_printed_of_tokens_as_they_come_is_the_text_up_to_a_stop(capsys, stops):
    tokenizer = tiny_tokenizer()
    text = "Ein Wort, 😀 und noch ein Antwort \n\n Umbau zum Ende . 漢字"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    printer, seen = Printer(tokenizer, stops), []
    printer.put(torch.tensor([ids]))  # the prompt
    for token in ids:
        printer.put(torch.tensor([token]))
        seen.append(capsys.readouterr().out)
    printer.end()
    seen.append(capsys.readouterr().out)
    wanted = min((text[: text.find(stop)] for stop in stops), key=len, default=text)
    assert "".join(seen) == f"{wanted}\n"
    assert sum(map(bool, seen)) > 5


def test_a_draft_shows_what_is_known_around_a_gap_and_an_answer_up_to_its_end(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    tokenizer = tiny_tokenizer()
    a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
    for known, ends, place, drafted, shown in (
        ({0: a, 2: c}, (), 1, [b], "t = 0.50  abc"),
        ({}, (c,), 7, [b, a, c, b], "t = 0.50  ba"),
    ):
        logits = torch.nn.functional.one_hot(torch.tensor([drafted]), 300).float()
        positions = torch.arange(place, place + len(drafted))[None]
        with Drafts(tokenizer, ends, known) as drafts:
            drafts(Evaluation(positions, torch.full(positions.shape, 0.5), logits, logits, False))
        assert re.search(rf"{re.escape(shown)}\s", capsys.readouterr().err)


def test_the_output_file_holds_prompts_answers_and_what_they_cost(model, lm, tmp_path):
    output = tmp_path / "answers.jsonl"
    prompts = ("--prompt", "Hello", "--prompt", "Ünïcode")
    lines(model, *prompts, *FAST, "--num-return-sequences", "2", "--out", output)
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello", "Ünïcode"]
    found = [answer["text"] for row in rows for answer in row["answers"]]
    assert found == texts(lm, ["Hello", "Ünïcode"], num_return_sequences=2)
    assert {(a["tokens"], a["evaluations_per_token"]) for row in rows for a in row["answers"]} == {(4, 3.0)}
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*arguments, **options):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(checkpoint, "load_language_model", refuse)


REFUSED = [
    ((), "There is nothing to answer. Give --prompt, --file, --infill, or --chat"),
    (("--prompt", "a", "--solver", "midpont"), "Unknown solver 'midpont'; did you mean 'midpoint'"),
    (("--prompt", "a", "--guidance", "classifier"), "did you mean 'classifier_free'"),
    (("--prompt", "a", "--speculate", "2", "--drafter", "promt_lookup"), "did you mean 'prompt_lookup'"),
    (("--prompt", "a", "--drafter", "prompt_lookup"), "guesses nothing with --speculate='off'"),
    (("--prompt", "a", "--speculate", "2", "--drafter", "{name: asistant, model: x}"), "did you mean 'assistant'"),
    (("--prompt", "a", "--speculate", "2", "--drafter", "{model: x}"), "A drafter needs a `name`"),
    (("--prompt", "a", "--speculate", "2", "--drafter", "{name: "), "--drafter, line 1: .* Correct the YAML"),
    (("--prompt", "a", "--speculate", "2", "--drafter", "assistant"), "Bad drafter 'assistant': model: Field required"),
    (
        ("--prompt", "a", "--speculate", "2", "--drafter", '{"name": "assistant", "model": "./none"}'),
        "There is no folder './none'. Give the folder of a small language model",
    ),
    (
        ("--prompt", "a", "--speculate", "2", "--drafter", f"{{name: assistant, model: '{__file__}'}}"),
        "test_generate.py' is a file. Give the folder of a small language model",
    ),
    (("--prompt", "a", "--preset", "l2d-papr"), "did you mean 'l2d-paper'"),
    (("--prompt", "a", "--num-inference-steps", "4"), "--num-inference-steps=4. Use 3 or 5"),
    (("--prompt", "a", "--class", "mth"), r"Unknown class 'mth'; did you mean 'math'\? This model knows"),
    (("--prompt", "a", "--class", "zzz"), r"Unknown class 'zzz'\. This model knows \['math', 'code'\]"),
    (("--prompt", "a", "--set", "solvr=euler"), "solvr: unknown field.*did you mean 'solver'"),
    (("--prompt", "a", "--set", "estimate.mod=argmax"), "estimate.mod: Extra inputs are not permitted"),
    (("--prompt", "a", "--set", "nothing"), "nothing"),
    (("--prompt", "a", "--set", "block_size=2"), "denoises one token per block; got block_size=2"),
    (("--prompt", "a", "--solver", "heun", "--set", "end_time=1.0"), "'heun' needs the velocity at the end time"),
    (("--prompt", "a", "--set", "guidance=[]", "--guidance-scale", "2"), "exactly one guidance; 0 are set"),
    (("--prompt", "a" * 130), "Prompt 0 has 130 tokens and with its answer would reach 386, but .* context is 128"),
    (("--prompt", "a", "--prompt", ""), "Prompt 1 is empty"),
    (("--prompt", "a", "--prompt", "b\udc80"), "Prompt 1: the text has half of a character"),
    (("--infill", "a\udc80<mask:3>"), "Text 0: the text has half of a character"),
    (("--prompt", "a", "--prompt", "b", "--stream"), "--stream shows one answer, got 2 prompts"),
    (("--prompt", "a", "--dtype", "fp16"), "--dtype must be float32, bfloat16 or float16, got 'fp16'"),
    (("--prompt", "a", "--do-sample", "--temperature", "0"), "--temperature must be above 0, got 0.0"),
    (("--prompt", "a", "--do-sample", "--temperature", "nan"), "--temperature should be a finite number, got nan"),
    (("--prompt", "a", "--stop", ""), "--stop should have at least 1 character"),
    (("--prompt", "a", "--class", "math", "--guidance-scale", "nan"), "--guidance-scale nan does not fit guidance"),
    (("--prompt", "a", "--set", "end_time=.nan"), "end_time: should be a finite number"),
    (("--prompt", "a", "--device", "abacus"), "--device 'abacus' cannot be used here"),
    (("--prompt", "a", "--speculate", "maybe"), "--speculate should be a number from 1 to 1000, 'auto' or 'off', got"),
    (("--prompt", "a", "--speculate", "0"), "--speculate should be a number from 1 to 1000, 'auto' or 'off', got 0"),
    (("--prompt", "a", "--guidance", "classifier_free"), "guides towards a class, and .* none.*Add --class"),
    (("--prompt", "a", "--guidance-scale", "1"), "guides towards a class, and .* none.*Add --class"),
    (("--prompt", "a" * 130), "Shorten the prompt or lower --max-new-tokens"),
    (("--prompt", "a", "--base", "./none"), "There is no folder './none'"),
    (("--prompt", "a", "--base", __file__), "test_generate.py' is a file. Give a folder with a model"),
    (("--file", "none.txt"), "There is no file 'none.txt'. Give a text file"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_mistakes_are_answered_before_weights_are_loaded(model, no_weights, arguments, message):
    fits = () if any(len(argument) > 100 for argument in arguments) else ("--max-new-tokens", "4")
    found = run(model, *arguments, *fits)
    assert isinstance(found.exception, L2DError), found.exception
    with pytest.raises(L2DError, match=message):
        raise found.exception


@pytest.mark.parametrize(
    "arguments",
    [
        ("--top-p", "2"),
        ("--num-inference-steps", "-1"),
        ("--max-new-tokens", "0"),
        ("--batch-size", "0"),
        ("--seed", "-1"),
        ("--solvr", "euler"),
    ],
)
def test_values_out_of_range_and_unknown_options_are_usage_errors(model, no_weights, arguments):
    found = run(model, "--prompt", "a", *arguments)
    assert found.exit_code == 2
    assert arguments[0] in found.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", '["a"]\n', r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n', r"a\.jsonl:1 has neither `prompt` nor `messages`; it has \['text'\]"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: turn 0 makes it not a conversation"),
        ("a.jsonl", '{"messages": ["hi"]}\n', r"a\.jsonl:1: turn 0 makes it not a conversation"),
        ("a.jsonl", '{"messages": []}\n', r"a\.jsonl:1: \[\] is not a conversation"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": null}]}\n', r"a\.jsonl:1: .* has the content None"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "a\\ud800"}\n', r"a\.jsonl:3: the text has half of a character"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n',
            r"a\.jsonl:1: .*(a list of parts|cannot render)",
        ),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read_is_named(model, no_weights, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(L2DError, match=message):
        raise run(model, "--file", tmp_path / name).exception


def test_an_output_file_is_never_overwritten(model, no_weights, tmp_path):
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(L2DError, match=r"mine.jsonl' exists. Name another --out"):
        raise run(model, "--prompt", "a", *FAST, "--out", tmp_path / "mine.jsonl").exception
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    with pytest.raises(L2DError, match="none' is missing or cannot be written"):
        raise run(model, "--prompt", "a", *FAST, "--out", tmp_path / "none" / "a.jsonl").exception


def test_an_output_file_that_appears_meanwhile_is_left_alone(model, tmp_path, monkeypatch):
    output = tmp_path / "a.jsonl"
    monkeypatch.setattr(Watch, "finish", lambda *_: output.write_text("mine"))
    with pytest.raises(OutputError, match=r"made by somebody else meanwhile. The answers are in .*a\.jsonl\.part"):
        raise run(model, "--prompt", "a", *FAST, "--out", output).exception
    assert output.read_text() == "mine"
    assert len((tmp_path / "a.jsonl.part").read_text().splitlines()) == 2  # the first says what was asked


@pytest.mark.parametrize("has_links", [True, False])
def test_files_of_somebody_else_with_names_like_ours_are_left_alone(tmp_path, monkeypatch, has_links):
    def no_link(*_):
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_link)
    output, part, whole = (tmp_path / f"a.jsonl{ending}" for ending in ("", ".part", ".whole"))
    whole.write_text("mine")
    with AnswerFile(output, [{"prompt": "a"}]) as file:
        file.write(0, [{"text": "b"}])
    assert json.loads(output.read_text()) == {"prompt": "a", "answers": [{"text": "b"}]}
    output.unlink()
    file = AnswerFile(output, [{"prompt": "a"}]).__enter__()
    file.write(0, [{"text": "b"}])
    output.write_text("mine")
    with pytest.raises(OutputError, match="made by somebody else"):
        file.__exit__(None, None, None)
    assert output.read_text() == "mine"
    output.unlink()
    part.write_text("a download, say, without an end of line")
    with pytest.raises(ConfigError, match="holds answers of another generation"), AnswerFile(output, []):
        pass
    assert part.read_text() == "a download, say, without an end of line"
    assert {path.name for path in tmp_path.iterdir()} == {part.name, whole.name}
    assert whole.read_text() == "mine"


@pytest.mark.parametrize("error", [signal.SIGTERM, OSError])
def test_an_interrupted_generation_goes_on_to_what_it_would_have_been(model, tmp_path, monkeypatch, error):
    answered = []

    def finish(watch, prompts):
        answered.append(None)
        if len(answered) == 3 and error is OSError:
            raise error
        if len(answered) == 3:
            signal.raise_signal(error)

    prompts = ["Hello", "Another one", "Hello", "A third"]
    how = (*FAST, "--do-sample", "--num-return-sequences", "2", "--batch-size", "2")
    arguments = [model, *(word for p in prompts for word in ("--prompt", p)), *how]
    whole = run(*arguments, "--out", tmp_path / "whole.jsonl").stdout
    output, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    with monkeypatch.context() as patched:
        patched.setattr(Watch, "finish", finish)
        found = run(*arguments, "--out", output)
    assert found.exit_code == (143 if error is signal.SIGTERM else 1)
    assert f"The answers so far are in {part}. The same command goes on from them." in found.stderr
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()[1:]]
    assert 0 < len(rows) < len(prompts)
    wanted = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["answers"] for row in rows] == [wanted[row["number"]]["answers"] for row in rows]
    # Nobody else's answers are gone on with or written over.
    for other, how in (
        (("--seed", "7"), "seed: 0 there, 7 now"),
        (("--stop", "x"), r"stop: \[\] there, None now; stop\.0: None there, 'x' now"),
        (("--prompt", "A fourth"), r"prompts\.number: 4 there, 5 now; prompts\.sha256: '"),
        (("--class", "code"), "class: None there, 'code' now"),
    ):
        with pytest.raises(L2DError, match=rf"answers\.jsonl\.part' holds answers of another generation: {how}"):
            raise run(*arguments, *other, "--out", output).exception
    with part.open("ab") as file:
        file.write(part.read_bytes()[:-9])  # the process ended while it wrote a row
    found = run(*arguments, "--out", output)
    assert f"Going on from {part}: {len(rows)} of 4 are answered." in found.stderr
    assert found.stdout == whole
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "whole.jsonl"}


def test_where_every_answer_is_known_no_weights_are_loaded(model, tmp_path, monkeypatch):
    arguments = (model, "--prompt", "a", "--prompt", "b", *FAST, "--out", tmp_path / "a.jsonl")
    monkeypatch.setattr(AnswerFile, "_publish", lambda *_: (_ for _ in ()).throw(OSError))
    run(*arguments)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "load_language_model", lambda *_: pytest.fail("weights were loaded"))
    assert len(lines(*arguments)) == 2
    assert [json.loads(line)["prompt"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == ["a", "b"]
    with pytest.raises(L2DError, match=r"a\.jsonl' is finished: it has answers to all of these 2\. Name another --out"):
        raise run(*arguments).exception
    with pytest.raises(L2DError, match=r"a\.jsonl' exists\. Name another --out"):
        raise run(*arguments, "--prompt", "c").exception


def test_two_processes_never_answer_into_one_file(model, tmp_path):
    with (
        AnswerFile(tmp_path / "a.jsonl", []),
        pytest.raises(BusyError, match=r"--out .*a\.jsonl' is in use by process"),
    ):
        raise run(model, "--prompt", "a", *FAST, "--out", tmp_path / "a.jsonl").exception


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "a", "--stream"), "show what one process does, but 2 were started"),
        (("--prompt", "a", "--out", "a.jsonl", "--trace", "a.html"), "show what one process does"),
        (("--chat",), "a talk show what one process does.*without accelerate or torchrun"),
        (("--prompt", "a"), "answers of 2 processes meet in a file. Name it with --out"),
    ],
)
def test_several_processes_show_nothing_as_it_comes(model, no_weights, monkeypatch, arguments, message):
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        raise run(model, *arguments, *FAST).exception


def test_each_of_several_processes_has_the_gpu_of_its_number_on_its_machine(monkeypatch):
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    used = []
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: used.append(device))
    assert (
        [check_device(name) for name in (None, "cuda", "cuda:0", "cpu")]
        == used
        == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"more processes on this machine than GPUs, which are 2\. Start 2"):
        check_device(None)
    # As a model of lm_eval leaves it on the second machine; accelerate has kept what the launcher said.
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"is": "there"})
    monkeypatch.setattr(PartialState, "_shared_state", {"local_process_index": 1})
    assert check_device(None) == "cuda:1"


def test_a_full_disk_while_answers_are_written_is_named(model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        found = run(model, "--prompt", "a", "--prompt", "b", *FAST, "--out", tmp_path / "answers.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert isinstance(found.exception, OutputError)
    assert "answers.jsonl' could not be written: File too large. Earlier answers are in" in str(found.exception)


def test_a_wrong_base_is_refused(model, no_weights, saved_tiny_lm):
    with pytest.raises(L2DError, match="Pass the right model as `base`"):
        raise run(model, "--prompt", "a", *FAST, "--base", saved_tiny_lm(seed=3)).exception


def test_a_folder_that_is_no_checkpoint_is_refused(no_weights, tmp_path):
    with pytest.raises(L2DError, match=r"holds no l2d\.json"):
        raise run(tmp_path, "--prompt", "a").exception


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "run.yaml", "--prompt", "a"),
        ("eval-steps", "run.yaml", "--data", "run.yaml"),
        ("diagnose", "run.yaml", "--data", "run.yaml"),
        ("convert", "run.yaml", "out", "--from", "l2d-reference"),
        ("config", "check", "run.yaml"),
    ],
    ids=lambda command: command[0],
)
def test_a_file_in_place_of_a_models_folder_is_called_one(no_weights, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    run_file = {"model": {"base": "run.yaml"}, "method": "l2d", "data": {"train": [{"path": "run.yaml"}]}}
    (tmp_path / "run.yaml").write_text(json.dumps(run_file | {"output_dir": "out"}))
    with pytest.raises(L2DError, match=r"'run\.yaml' is a file\. Give a folder with a model; .* is its output_dir"):
        raise CliRunner().invoke(app, [*command]).exception


@pytest.fixture
def plain(tmp_path):
    return write(tmp_path, chat=False, classes=())


def test_what_a_model_without_classes_template_or_tokenizer_cannot_do(plain, no_weights, tmp_path):
    for arguments, message in [
        (("--guidance-scale", "2"), "scale 2 needs a model trained with class labels; this one has none"),
        (("--guidance-scale", "1"), "scale 1 needs a model trained with class labels; this one has none"),
        (("--guidance", "classifier_free"), "scale 1 needs a model trained with class labels; this one has none"),
        (("--class", "math"), "This model was trained without classes, got the class 'math'"),
        (("--chat",), "Prompt 0 is a conversation, but the tokenizer .* has no chat template"),
    ]:
        with pytest.raises(L2DError, match=message):
            raise run(plain, "--prompt", "a", *FAST, *arguments).exception
    for file in (tmp_path / "base").glob("token*"):
        file.unlink()
    with pytest.raises(L2DError, match="This model has no tokenizer"):
        raise run(plain, "--prompt", "a", *FAST).exception
