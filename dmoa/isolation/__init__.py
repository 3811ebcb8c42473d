"""The parts of the sandbox: what the host offers, how a program is started, watched, held and judged."""
