"""What a study measures of its fine-tuned models: one file a measure.

Each has `begin(plan, fine_tunes, place)`, which reads the models of a group once, and returns a function from
a way's name and a column to the values of one row.
"""
