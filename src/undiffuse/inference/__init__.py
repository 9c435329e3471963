"""Floor 4: questions put to a trained model or a given energy: how large is its partition function?"""
