"""A stand-in for py-spinnaker2 in tests: its documented interface and arithmetic, checked to the letter.

Whatever py-spinnaker2's documentation does not promise is an error here: unknown models, parameters and recordings,
weights that are no integers of the synapse word, delays outside it, a missing reset, cores that would overflow.
"""
