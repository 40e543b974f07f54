"""What a pruned parameter is made of: a sum of parts, each a small PyTree. Pure; no model, no file."""
