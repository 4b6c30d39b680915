"""python -m benchmarks NAME: measure, print a table, and write the figures to benchmarks/results."""

import argparse
import importlib
import sys

# Only the chosen one is imported: `kernels` needs torch and triton alone, which is all that some machines have.
COMMANDS = {
    "accuracy": ("benchmarks.accuracy.command", "perplexity of the methods on small trained models"),
    "ablate": ("benchmarks.accuracy.ablate", "what each ingredient of sliderquant brings"),
    "random-model": ("benchmarks.random_model", "write a model of random weights in the shapes of a known one"),
    "mixed": (
        "benchmarks.accuracy.mixed",
        "bits chosen for every linear, against more bits for the first and last layers",
    ),
    "minutes": ("benchmarks.speed.minutes", "minutes of quantizing on known GPUs, by count of operations"),
    "kernels": ("benchmarks.kernels.command", "kernels against their floors and the best public kernels"),
    "gpu-cache": ("benchmarks.gpu.cache.command", "compiled kernels in one file, for a machine with a GPU"),
    "load": ("benchmarks.speed.load", "seconds per GB of loading a checkpoint, against plain reading"),
    "step": ("benchmarks.speed.step", "a training step with quantizers against one without"),
    "host": ("benchmarks.speed.host", "microseconds that calls cost on the host"),
    "decode-step": ("benchmarks.speed.decode_step", "what a token of generate takes on a GPU, and its graph alone"),
    "gpu": ("benchmarks.gpu.command", "prove the package on a GPU: tests, goals, tuning and decoding in ten minutes"),
    "report": ("benchmarks.kernels.report", "tables and roofline plots from the files of `kernels`"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    chosen = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == chosen:
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
