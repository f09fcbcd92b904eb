"""The verb `distill`: a student learns from its teacher, in stages."""
