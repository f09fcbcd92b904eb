"""The verb `convert`: a teacher becomes a holographic student, with a report of what it cost."""
