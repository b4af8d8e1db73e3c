import pytest

from stoa_jax import command_line
from stoa_jax.errors import UserError


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    def fail(error):
        raise error

    assert command_line.run(lambda: 1) == 1
    assert command_line.run(lambda: fail(UserError("a: no such file"))) == 2
    assert capsys.readouterr().err == "error: a: no such file\n"
    assert command_line.run(lambda: fail(KeyboardInterrupt()), stopped="run it again") == 130
    assert capsys.readouterr().err == "run it again\n"
    with pytest.raises(OSError):
        command_line.run(lambda: fail(OSError("x")))
    assert command_line.run(lambda: fail(OSError("x")), expected=(UserError, OSError)) == 2
