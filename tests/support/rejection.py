"""How every command fails at a user's mistake."""


def rejected(capsys, main, *argv):
    """Run a command that must fail as a user's mistake does: its sentence."""
    assert main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err
