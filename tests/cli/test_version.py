import e3kernels


def test_the_command_says_its_version(e3):
    done = e3("--version")
    assert (done.exit_code, done.output) == (0, f"e3kernels {e3kernels.__version__}\n")
