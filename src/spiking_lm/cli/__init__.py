"""The ``spiking-lm`` command: one module per verb, torch imported only by the verbs that need it."""
