"""The command line itself: what it imports, and how it ends."""

import subprocess
import sys

import pytest

from moka.cli.main import COMMANDS


def run(program, *arguments):
    return subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["demo", "--help"], ["data", "formats"], ["data", "formats", "pope"]],
    ids=" ".join,
)
def test_help_and_lists_do_not_import_torch(words):
    program = "import sys; sys.argv = ['moka', *sys.argv[1:]]; sys.orig_argv[1:] = ['-m', 'moka']\n"
    program += "try:\n    from moka.cli.main import main\n    main()\n"
    program += "finally:\n    print(sorted({'torch', 'transformers', 'peft', 'gradio'} & set(sys.modules)))\n"
    done = run(["-c", program], *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(moka, command):
    done = moka(command, "--help")
    assert done.code == 0
    assert f"usage: moka {command}" in done.out


def test_an_unknown_command_lists_the_known_ones(moka):
    done = moka("trian")
    assert done.code == 2
    assert "'trian'" in done.err
    assert "'train'" in done.err


def test_a_closed_pipe_is_no_traceback():
    program = f"{sys.executable} -m moka train --help-config | head -n 1"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.stdout


def test_importing_moka_registers_it_with_peft_and_transformers():
    program = "import moka; from peft import PeftType; from transformers import AutoConfig; "
    program += "print(PeftType.MOKA.value, AutoConfig.for_model('moka').model_type)"
    done = run(["-c", program])
    assert done.stdout.split() == ["MOKA", "moka"], done.stderr
