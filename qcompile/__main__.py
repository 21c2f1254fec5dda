"""`python -m qcompile`, which is how torchrun starts a command: `torchrun --nproc-per-node 2 -m qcompile quantize`."""

from qcompile.cli import main

main()
