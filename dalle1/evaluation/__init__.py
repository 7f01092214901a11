"""The ranking benchmark: draws, scores and checks candidates, and reports what ranking gains."""
