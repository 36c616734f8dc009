"""The command line: ``lightning-sea fit|validate|test|predict -c config.yaml``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from . import callbacks, data, tasks  # noqa: F401  configurations name their classes without a path
from .tasks import DistillationModule


class SEACLI(LightningCLI):
    """LightningCLI over this package's tasks and data modules.

    The data module takes its tokenizer from the model, and the model its task, with labels and metrics, from the data
    module. With ``--ckpt_path``, the model's arguments that the checkpoint holds take the place of defaults, and what a
    configuration file or the command line says goes before them: ``--model.sea.k 32`` changes k of a trained model.
    (LightningCLI itself lets the checkpoint win.)

    ``--model.help=GLUEModule`` explains the arguments of a class, ``--model.help=GLUEModule --model.sea.help`` those of
    a group in it.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer")
        parser.link_arguments("data.init_args.task", "model.init_args.task")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        path = checkpoint_path(sys.argv[1:] if args is None else args)
        if path:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            model = {"class_path": checkpoint["module_class"], "init_args": checkpoint["hyper_parameters"]}
            for subparser in self._subcommand_parsers.values():
                subparser.set_defaults(model=model)
        super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        self.save_config_kwargs["config_filename"] = f"{self.subcommand}.yaml"  # testing keeps the settings of training

    def _parse_ckpt_path(self) -> None:
        """Nothing left to do: ``parse_arguments`` has read the checkpoint."""


def checkpoint_path(args: ArgsType) -> str | None:
    """The file that ``--ckpt_path`` names in a list of arguments; None without one, or for names such as "best"."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--ckpt_path")
    path = finder.parse_known_args(list(args))[0].ckpt_path if isinstance(args, (list, tuple)) else None
    return path if path and Path(path).is_file() else None


def run(args: Sequence[str] | None = None, cli_class: type[SEACLI] = SEACLI) -> SEACLI:
    """Run the command line; ``args`` stand in for those of the process."""
    return cli_class(
        DistillationModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
        parser_kwargs={"parser_mode": "omegaconf"},
        auto_configure_optimizers=False,  # the module has its own groups
        load_from_checkpoint_support=False,  # the module saves its arguments itself, as plain types
        save_config_kwargs={"overwrite": True},
    )


def main() -> None:
    """The console script: what it returned would become the exit status."""
    run()
