"""The ranking benchmark: draws, scores and judges candidates, and reports what ranking gains."""
