"""``python -m concept_unlearn``"""

from .cli import main

main()
