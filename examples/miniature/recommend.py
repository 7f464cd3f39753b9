"""Recommend class words for pictures of the miniature world, as a vision-language model does for photographs.

    python recommend.py --instance_data_dir concepts/clown_fish

In the paper's Table 6 a model looks at the photographs and names the subject by one or two words, for --initializer_token.
Here the attribute classifiers do: they read each picture, and the most frequent answer counts. One word is the shape. Two
words add the pattern, or the colour where the subject is plain or split in two colours: "fish" and "striped fish".
"""

import argparse
from collections import Counter
from pathlib import Path

import judges
from PIL import Image


def recommend(pictures, classifiers):
    """One word and two words for PIL pictures of one subject."""
    labels = classifiers.read(pictures)
    shape, pattern, colour = (
        Counter(each[k] for each in labels).most_common(1)[0][0] for k in ("shape", "pattern", "colour")
    )
    return shape, f"{colour if pattern in ('plain', 'split') else pattern} {shape}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instance_data_dir", type=Path, required=True, help="pictures of one subject, as PNG")
    args = parser.parse_args(argv)
    files = sorted(args.instance_data_dir.glob("*.png"))
    if not files:
        parser.error(
            f"--instance_data_dir {args.instance_data_dir} has no PNG: give a folder that world.py has written"
        )
    try:
        pictures = [Image.open(file).convert("RGB") for file in files]
    except OSError as error:
        parser.error(f"--instance_data_dir {args.instance_data_dir} has a damaged PNG, so remove it: {error}")
    for words in recommend(pictures, judges.load_classifiers()):
        print(f'--initializer_token "{words}"')


if __name__ == "__main__":
    main()
