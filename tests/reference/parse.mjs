// Reads every JavaScript sample of a document as a module, and runs none.
import { readFileSync } from 'node:fs'
import { SourceTextModule } from 'node:vm'

const document = JSON.parse(readFileSync(process.argv[2], 'utf8'))
let count = 0
for (const verbs of Object.values(document.paths)) {
  for (const { operationId, 'x-codeSamples': samples } of Object.values(verbs)) {
    for (const { source } of samples.filter(({ lang }) => lang === 'JavaScript')) {
      new SourceTextModule(source, { identifier: operationId })
      count += 1
    }
  }
}
if (count < 100) throw new Error(`only ${count} samples`)
