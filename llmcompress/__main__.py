from llmcompress.cli import main

main()
