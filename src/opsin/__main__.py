from opsin.cli import main

main(prog_name="opsin")
