"""``kdrun doctor``."""

import importlib.metadata

from kdrun import doctor


def test_reports_versions_hardware_and_settings(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    report = doctor.examine()
    text = report.text
    assert importlib.metadata.version("torch") in text
    assert "torch threads" in text
    assert "very-secret" not in text
    assert "WANDB_API_KEY" in text
    assert "set (not shown)" in text


def test_names_versions_that_do_not_fit(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.1" if name == "timm" else real(name)
    )
    report = doctor.examine()
    told = [line for line in report.problems if line.startswith("kdrun") and "timm>=" in line]
    assert len(told) == 1 and ", 0.1 is" in told[0]


def test_names_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("KDRUN_DATA", str(tmp_path / "nowhere"))
    problems = "\n".join(doctor.examine().problems)
    assert f"cannot write in {tmp_path}" in problems
    assert "KDRUN_DATA" in problems
