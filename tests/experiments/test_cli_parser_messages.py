import pytest
from tenfold.experiments.parser_messages import condense

UNION = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.pytorch.core.module.LightningModule'>, <class 'NoneType'>]
  Errors:
    - {error}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {{'class_path': 'x'}}"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            UNION.format(error="Problem with given class_path 'no.Such':\n        Option 'widht' is not accepted"),
            "model: Option 'widht' is not accepted by no.Such",
        ),
        (
            UNION.format(
                error="Problem with given class_path 'collections.Counter':\n        Option 'iterabel' is not accepted"
            ),
            "model: Option 'iterabel' is not accepted by collections.Counter; did you mean iterable?",
        ),
        (
            UNION.format(
                error="Problem with given class_path 'a.B':\n        Parser key \"width\":\n"
                "          Expected a <class 'int'>. Got value: abc"
            ),
            "model: width of a.B: Expected a <class 'int'>. Got value: abc",
        ),
        (
            UNION.format(error="Expected a dot import path string: ToyModul"),
            "model: there is no class 'ToyModul'; did you mean ToyModule?",
        ),
        (
            UNION.format(error="Problem with given class_path 'a.Zzz':\n        No module named 'a'"),
            "model: there is no class 'a.Zzz'; known short names: Other, ToyModule",
        ),
        (
            "Subcommand 'fit' does not accept option 'trainer.max_stps'",
            "Option 'trainer.max_stps' is not accepted; did you mean trainer.max_steps?",
        ),
        ("unrecognized arguments: --foo 3", "Option 'foo' is not accepted"),
        ("the following arguments are required: fit.model", "no model; give --config FILE or --model NAME"),
        ("something\n  else", "something else"),
    ],
)
def test_one_line_that_helps(message, line):
    assert condense(message, class_names=["ToyModule", "Other"], options=["trainer.max_steps", "model"]) == line
