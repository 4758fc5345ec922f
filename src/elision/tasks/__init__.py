"""Tasks for lm-evaluation-harness that need no network: the generator's word problems, and local data sets.

Each .yaml is one task, named after its file; `elision eval MODEL --tasks elision_word_problems` finds them. Those of
data sets read the folder that ELISION_DATA names, or the one beside a checkout (`elision.data.shared_folder`).
"""
