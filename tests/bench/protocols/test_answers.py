"""Rules by which the papers read answers, on answers made by hand."""

import json
import warnings

import pytest

pytest.importorskip("lm_eval")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its text has escapes that Python will refuse one day
    import lm_eval.tasks.hendrycks_math.utils  # noqa: F401

from l2d_bench.protocols import answers, prompts, scores, tess
from l2d_bench.protocols.alpaca_eval import write_outputs
from l2d_framework.errors import DataError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### -12", "-12"),
        ("#### 1,234,567", "1234567"),
        ("#### 2.50 dollars", "2.50"),
        ("#### 5\n#### 6", "5"),
        ("the answer is 7", None),
        ("### 7", None),
        ("####7", None),
        ("#### $7", None),
        ("#### .,", None),
        ("", None),
    ],
)
def test_marked_numbers_keep_sign_and_lose_commas(text, wanted):
    assert answers.marked_number(text) == wanted


def test_gsm8k_compares_numbers_as_written():
    row = {"answer": "16 - 3\n#### 1,300"}
    assert scores.gsm8k(row, ["#### 1300"]) == {"acc": 1.0, "format_acc": 1.0}
    assert scores.gsm8k(row, ["#### 1300.0"]) == {"acc": 0.0, "format_acc": 1.0}
    assert scores.gsm8k(row, ["#### -1300"]) == {"acc": 0.0, "format_acc": 1.0}
    assert scores.gsm8k(row, ["it is 1300"]) == {"acc": 0.0, "format_acc": 0.0}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"so $\boxed{4}$.", "4"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)} follows", r"\left(3, \frac{\pi}{2}\right)"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{5} and \boxed{cut off", "5"),
        (r"\boxed{}", ""),
        ("nothing", None),
    ],
)
def test_boxed_is_the_last_complete_box_with_its_inner_braces(text, wanted):
    assert answers.boxed(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("between 3 and 12", "12"),
        ("it is -5", "5"),
        ("it costs 1,250 in all", "1250"),
        ("about 0.75.", "0.75"),
        (r"\boxed{x} where x = 3", "x"),
        ("no number", None),
    ],
)
def test_without_a_box_the_last_number_serves_and_loses_its_sign(text, wanted):
    assert answers.math_answer(text) == wanted


@pytest.mark.parametrize(
    ("mine", "wanted", "is_same"),
    [
        (r"\frac12", r"\frac{1}{2}", True),
        (r"\dfrac{1}{2}", r"\tfrac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        ("3/4", r"\frac{3}{4}", True),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        (r"-\frac{2}{4}", r"\frac{-1}{2}", True),
        (r"\frac{6}{3}", "2", True),
        (r"\frac{3}{4}", "0.75", True),
        ("7.0", "7", True),
        ("1,000", "1000", True),
        (r"\sqrt2", r"\sqrt{2}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        (r"90^\circ", "90", True),
        (r"50\%", "50", True),
        ("x = 5", "5", True),
        ("5", "-5", False),
        (r"\frac{1}{2}", r"\frac{2}{1}", False),
        (r"\frac{1}{0}", r"\frac{2}{0}", False),
        (r"\frac", r"\frac{1}{2}", False),
        (r"\sqrt", r"\sqrt{2}", False),
        ("(1,2)", "(2,1)", False),
        ("nan", "nan()", False),
        ("1,2", "12", False),
        ("1,234,567", "1234567", True),
    ],
)
def test_math_answers_agree_as_text_number_or_fraction(mine, wanted, is_same):
    assert answers.same_math(mine, wanted) is is_same
    assert answers.same_math(wanted, mine) is is_same


def test_math_reports_boxes_beside_accuracy():
    row = {"solution": r"thus $\boxed{12}$"}
    assert scores.math(row, [r"\boxed{12}"]) == {"acc": 1.0, "format_acc": 1.0}
    assert scores.math(row, ["it is -12"]) == {"acc": 1.0, "format_acc": 0.0}
    assert scores.math(row, ["who knows"]) == {"acc": 0.0, "format_acc": 0.0}


@pytest.mark.parametrize(
    ("text", "labels", "wanted"),
    [
        ("B", "ABCD", "B"),
        ("B. because", "ABCD", "B"),
        ("(C)", "ABCD", "C"),
        ("Because A, not B", "ABCD", "A"),
        ("Answer: D", "ABCD", "D"),
        ("A_1", "ABCD", "A"),
        ("A1 or B2", "ABCD", None),
        ("b", "ABCD", None),
        ("E", "ABCD", None),
        ("E", "ABCDEFGHIJ", "E"),
        ("J!", "ABCDEFGH", None),
        ("I think B", "ABCDEFGHIJ", "I"),
        ("3)", "1234", "3"),
        ("é A", "AB", "A"),
        ("Aé B", "AB", "B"),
        ("", "AB", None),
    ],
)
def test_an_option_is_the_first_of_its_labels_that_nothing_alphanumeric_follows(text, labels, wanted):
    assert answers.option(text, list(labels)) == wanted


def test_a_question_has_as_many_labels_as_options():
    pro = {"question": "q", "options": ["a", "b", "c"], "answer": "C"}
    arc = {"question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"}
    mmlu = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3}
    piqa = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    for row, labels, right in ((pro, "ABC", "C"), (arc, "123", "2"), (mmlu, "ABCD", "D"), (piqa, "AB", "B")):
        assert prompts.labels_of(row) == list(labels) and prompts.label_of(row) == right
        assert scores.options(row, [right]) == {"acc": 1.0, "format_acc": 1.0}
        assert scores.options(row, ["K"]) == {"acc": 0.0, "format_acc": 0.0}
    assert scores.options(pro, ["D"])["format_acc"] == 0.0


@pytest.mark.parametrize(
    ("answer", "is_right", "is_right_to_authors"),
    [
        ("The answer is 35.", 1.0, 1.0),
        ("from 40 to 35", 1.0, 1.0),
        ("-35", 0.0, 1.0),
        ("70-35", 1.0, 1.0),
        ("(2)+35", 1.0, 1.0),
        ("3.5", 0.0, 1.0),
        ("35.0", 1.0, 0.0),
        ("it has no number", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_authors_scorer_loses_sign_and_point_and_ours_does_not(answer, is_right, is_right_to_authors):
    row = {"answer": "thus\n#### 35"}
    assert tess.gsm8k(row, [answer])["exact_match"] == is_right
    assert tess.gsm8k_authors(row, [answer])["exact_match"] == is_right_to_authors


def test_thousands_commas_are_removed_before_numbers_are_looked_for():
    row = {"answer": "#### 12,500"}
    for score in (tess.gsm8k, tess.gsm8k_authors):
        assert score(row, ["in all 12,500 coins"]) == score(row, ["12500"]) == {"exact_match": 1.0}
        assert score(row, ["12, 500"]) == {"exact_match": 0.0}


def test_a_chain_of_thought_states_its_answer_up_to_the_full_stop():
    assert answers.stated("First ... So the answer is (B). The answer is (C).") == "(B)"
    assert answers.stated("The answer is True.") == "True"
    assert answers.stated(" (A) ") == "(A)"
    assert answers.stated("the answer is open") == "the answer is open"


def test_f1_of_squad_counts_common_words_and_takes_the_best_answer():
    row = {"answers": {"text": ["the Eiffel Tower", "Tower of Paris"]}}
    assert tess.squad(row, ["Eiffel tower!"]) == {"exact_match": 1.0, "f1": 1.0}
    assert tess.squad(row, ["Tower of Rome"]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert tess.squad(row, ["nothing"]) == {"exact_match": 0.0, "f1": 0.0}
    assert tess.squad(row, [""]) == {"exact_match": 0.0, "f1": 0.0}


def test_trivia_accepts_any_name_within_the_answer():
    row = {"answer": {"value": "David Seville", "aliases": ["The Ross Bagdasarian", "!"]}}
    assert tess.trivia(row, ["It was ross bagdasarian, I think"]) == {"acc": 1.0}
    assert tess.trivia(row, ["DAVID SEVILLE"]) == {"acc": 1.0}
    assert tess.trivia(row, ["Seville"]) == {"acc": 0.0}


def test_alpaca_eval_reads_answers_in_the_order_of_the_data(tmp_path):
    samples, file = tmp_path / "samples.jsonl", tmp_path / "outputs.json"
    rows = [
        {"doc_id": n, "doc": {"instruction": f"say {n}", "dataset": "koala"}, "resps": [[f" {n}\n"]]} for n in (1, 0)
    ]
    samples.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert write_outputs(samples, file, "tess2") == 2
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found == [
        {"instruction": f"say {n}", "output": str(n), "generator": "tess2", "dataset": "koala"} for n in (0, 1)
    ]
    wrong = tmp_path / "wrong.jsonl"
    for text in ("", "{}", "no json"):
        wrong.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="log_samples"):
            write_outputs(wrong, file, "tess2")
    assert json.loads(file.read_text(encoding="utf-8")) == found
