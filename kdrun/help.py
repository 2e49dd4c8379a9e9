"""What kdrun says of itself: without a word, and with ``--help``."""

from __future__ import annotations

from kdrun import __version__

FIRST_WORDS = f"""\
kdrun {__version__}: knowledge-distillation experiments from config files. Offline, on a CPU:

  kdrun method=sinkhorn student=resnet18      teacher, student alone, distilled student: one table
  kdrun method=dkd training=smoke             one epoch of each, in seconds
  kdrun -m method=kd,dkd seed=0,1,2           six runs that share one teacher

  kdrun ls methods                            what there is (models, datasets, recipes, ...)
  kdrun show method=sinkhorn                  what it does, its paper, its options
  kdrun --help                                all commands
Results go to outputs/; the same command again continues or shows them."""

HELP = """\
kdrun [flags] [key=value ...]         run one experiment
kdrun -m [key=value,value ...]        run many: grids, searches, clusters
kdrun VERB ...

{verbs}

Flags
  -m, --multirun      several values per key; launcher=joblib|slurm|ray, sweeper=optuna,
                      sweep=NAME for one from a file
  --config-dir DIR    a folder of your own configs (DIR/method/mine.yaml, ...), may be repeated
  --version, --help

What a run is made of (kdrun ls lists the choices, kdrun show their options)
  {groups}
  student=timm/NAME, torchvision/NAME, hf/NAME or a dotted path to a class of your own
  dry=true trains one step of each stage; rerun=true starts afresh; protocol=paper tests every epoch

Completion: put this into ~/.bashrc (in zsh after: autoload -U +X bashcompinit && bashcompinit)
  complete -o nospace -C 'kdrun complete' kdrun"""
"""For ``str.format`` with the ``verbs`` and the config ``groups`` there are."""
