from opsin.cli import main

main()
