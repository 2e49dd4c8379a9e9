"""The shipped launchers and sweepers are known to their plugins."""

import dataclasses
import importlib

import pytest
import yaml

from kdrun.catalogue import open_catalogue, shipped

PLUGINS = {
    "launcher/joblib": ("hydra_plugins.hydra_joblib_launcher.config", "JobLibLauncherConf"),
    "launcher/slurm": ("hydra_plugins.hydra_submitit_launcher.config", "SlurmQueueConf"),
    "launcher/local": ("hydra_plugins.hydra_submitit_launcher.config", "LocalQueueConf"),
    "launcher/ray": ("hydra_plugins.hydra_ray_launcher._config", "RayLauncherConf"),
    "sweeper/optuna": ("hydra_plugins.hydra_optuna_sweeper.config", "OptunaSweeperConf"),
}

VARIANT = "sweeper/random"
"""The Optuna sweeper with another way of drawing."""


def test_none_is_forgotten_here():
    catalogue = open_catalogue()
    names = {f"{group}/{n}" for group in ("launcher", "sweeper") for n in catalogue.choices(group)}
    assert names == {*PLUGINS, VARIANT}


@pytest.mark.parametrize("name", PLUGINS)
def test_entries_are_the_plugins_own(name):
    module, kind = PLUGINS[name]
    pytest.importorskip(module.rpartition(".")[0])
    fields = {f.name for f in dataclasses.fields(getattr(importlib.import_module(module), kind))}
    group, _, choice = name.partition("/")
    node = yaml.safe_load(open_catalogue().path(group, choice).read_text())
    assert set(node) <= fields
    if group == "sweeper":
        assert set(node) == fields - {"defaults"}


@pytest.mark.parametrize("name", PLUGINS)
def test_hydra_builds_it(name, tmp_path):
    pytest.importorskip(PLUGINS[name][0].rpartition(".")[0])
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton
    from hydra.types import HydraContext

    Singleton.set_state(Singleton.get_state())
    group, _, choice = name.partition("/")
    ConfigStore.instance().store("sweep", {})
    with initialize_config_dir(str(shipped() / "sweep"), version_base="1.3"):
        words = [f"hydra/{group}=kdrun/{choice}", f"hydra.sweep.dir={tmp_path}"]
        config = compose("sweep", words, return_hydra_config=True)
        build = getattr(Plugins.instance(), f"instantiate_{group}")
        context = HydraContext(config_loader=None, callbacks=None)
        assert build(hydra_context=context, task_function=print, config=config) is not None
