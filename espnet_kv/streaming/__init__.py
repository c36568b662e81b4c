"""Recognition of audio as it arrives: features, CTC search and the recognizer around them."""
