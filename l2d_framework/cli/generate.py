"""`l2d generate`: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from l2d_framework.cli import common, completion
from l2d_framework.errors import ConfigError


def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt; may be given several times.")] = None,
    file: Annotated[Path | None, typer.Option(help="Prompts: a text file with one a line, or JSONL.")] = None,
    infill: Annotated[
        list[str] | None, typer.Option(help="Text whose gaps, such as <mask:8> for 8 tokens, are to be filled.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Use the chat template; without prompts, talk on the terminal.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Network evaluations per token, the model's own number if left out; 0 is the plain language model.",
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="Name of the solver, of those in `l2d plugins`; the model's own if left out.",
            autocompletion=completion.names("solver"),
        ),
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a guidance, of those in `l2d plugins`; the first is innermost. The model's own if left out.",
            autocompletion=completion.names("guidance"),
        ),
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Scale of the guidance.")] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="Class label of the prompts.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Named sampling settings, such as l2d-adaptive.", autocompletion=completion.names("preset")),
    ] = None,
    set_: common.Settings = None,
    do_sample: Annotated[bool | None, typer.Option(help="Draw the token instead of taking the most likely.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the draw.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Of the draw.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Of the draw; 0 for all tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends an answer and is left out of it.")] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all random numbers; the model's own if left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time; does not change the answers.")] = 8,
    stream: Annotated[
        bool | None,
        typer.Option(
            help="Print tokens as they come, or drafts of a whole answer or gap; one prompt only. Where neither is "
            "given, tokens of a single answer come so on a terminal."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write how the answer took shape to this .html page or .png; one prompt only.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write the answers to this JSONL file. Until all are there, they are in FILE.part, with which "
            "the same command goes on."
        ),
    ] = None,
    base: common.Base = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    device_map: common.DeviceMap = None,
    offload_folder: common.OffloadFolder = None,
    merge: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="Fold the adapter into matrices beside it: faster, more memory; auto: where there is plenty."
        ),
    ] = "auto",
    speculate: Annotated[
        str,
        typer.Option(
            help="Tokens that are guessed ahead, to be denoised at once; or auto, or off.",
            autocompletion=completion.values("auto", "off"),
        ),
    ] = "off",
    drafter: Annotated[
        str | None,
        typer.Option(
            help="Who guesses: the language model, or by name such as prompt_lookup, or with its options such as "
            "'{name: assistant, model: FOLDER}'.",
            autocompletion=completion.names("drafter"),
        ),
    ] = None,
    graph: Annotated[bool, typer.Option(help="Let an NVIDIA GPU replay the steps of a token from a graph.")] = True,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Run layers as torch.compile makes them: slow at first, then faster.")
    ] = False,
) -> None:
    """Generate text with a trained model.

    Under `accelerate launch -m l2d_framework.cli generate` several processes share the prompts of a file out.
    """
    chosen = common.sampling(
        set_,
        solver,
        preset=preset,
        num_inference_steps=num_inference_steps,
        guidance=[{"name": name} for name in guidance] if guidance else None,
        seed=seed,
    )
    common.check_dtype(dtype)
    guessing = None if drafter is None else common.component("drafter", drafter)
    has_prompts = bool(prompt) or file is not None
    if infill and (has_prompts or chat or num_return_sequences > 1):
        raise ConfigError("--infill fills gaps and answers nothing. Leave out prompts, --chat and several answers.")
    if infill and (do_sample or stop or class_name):
        raise ConfigError("--infill takes the most likely tokens. Leave out --do-sample, --stop and --class.")
    if not has_prompts and not chat and not infill:
        raise ConfigError("There is nothing to answer. Give --prompt, --file, --infill, or --chat to talk.")
    if not has_prompts and not infill and (out is not None or trace is not None):
        raise ConfigError("--out and --trace keep answers to prompts, and a talk has none. Give --prompt or --file.")
    if trace is not None and num_inference_steps == 0:
        raise ConfigError("--trace shows network evaluations, and with --num-inference-steps 0 there are none.")
    if not do_sample and any(value is not None for value in (temperature, top_p, top_k)):
        raise ConfigError("--temperature, --top-p and --top-k shape a draw. Add --do-sample, or leave them out.")
    processes = common.place()[1]
    if processes > 1 and (stream or trace is not None or not (has_prompts or infill)):
        raise ConfigError(
            f"--stream, --trace and a talk show what one process does, but {processes} were started. Start "
            "`l2d generate` without accelerate or torchrun."
        )
    if processes > 1 and out is None:
        raise ConfigError(f"The answers of {processes} processes meet in a file. Name it with --out, or start one.")
    if (stream or not (has_prompts or infill)) and num_return_sequences > 1:
        raise ConfigError(f"One answer at a time can be shown, got --num-return-sequences {num_return_sequences}.")

    from l2d_framework.models.labels import check_class_early

    check_class_early(model, class_name)

    from l2d_framework.cli.answer_file import check_answer_file, show_answers, shown_if_interrupted
    from l2d_framework.cli.generate_session import Session, read_prompts

    named = read_prompts(prompt or [], file, chat=chat)
    prompts = list(named.values())
    asked: list[dict[str, Any]] = [{"infill": text} for text in infill or []] or [{"prompt": one} for one in prompts]
    if trace is not None and (len(asked) != 1 or num_return_sequences > 1):
        raise ConfigError("--trace shows how one answer takes shape. Give one prompt or text, and ask for one answer.")
    if stream and len(asked) > 1:
        what = "texts" if infill else "prompts"
        raise ConfigError(f"--stream shows one answer, got {len(asked)} {what}. Leave it out or give one of them.")
    decoding = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    options: dict[str, Any] = {name: value for name, value in decoding.items() if value is not None}
    session = Session(
        model,
        base=base,
        dtype=dtype,
        sampling=chosen,
        options={**options, "max_new_tokens": max_new_tokens},
        guidance_scale=guidance_scale,
        class_name=class_name,
        stop=stop or [],
        samples=num_return_sequences,
        running={
            "merge": merge,
            "graph": graph,
            "compile": compile_,
            "speculate": int(speculate) if speculate.isdecimal() else speculate,
            "drafter": guessing,
        },
        is_watched=trace is not None,
        placing={"device_map": device_map, "offload_folder": offload_folder},
        device=device,
    )
    if trace is not None:
        from l2d_framework.tracing import check_trace_file

        check_trace_file(trace)
    check_answer_file(out, asked)
    if infill:
        session.check_infilling(infill)
    # Without prompts there will be a conversation: find out now whether this tokenizer can hold one.
    if chat:
        session.warn_of_chats()
    encoded = session.encode(prompts or [[{"role": "user", "content": "?"}]], list(named) or None) if not infill else []
    if not asked:
        session.load()
        session.talk()
        return
    names = list(named) or [f"Text {number}" for number in range(len(asked))]
    with session.file(out, asked) as answers, shown_if_interrupted(answers, names):
        if stream is None and answers.missing and len(asked) == num_return_sequences == processes == 1:
            stream = sys.stdout.isatty() and not infill and not session.is_whole
        if answers.missing or stream or trace is not None:
            session.load()
            if infill:
                session.infill(infill, answers, stream=bool(stream), trace=trace)
            elif stream or trace is not None:
                answers.write(0, [session.answer_one(prompts[0], stream=bool(stream), trace=trace)])
            else:
                session.answer_all(prompts, encoded, answers, batch_size=batch_size)
    if answers.has_all and (not stream or infill):
        show_answers(names, answers)
