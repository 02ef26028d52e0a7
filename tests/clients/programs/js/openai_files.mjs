// Files with OpenAI's package: sent as a stream, listed, read, deleted.

import assert from "node:assert/strict";
import { createReadStream, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import OpenAI, { NotFoundError, toFile } from "openai";

const client = new OpenAI({ maxRetries: 0 });
const data = '{"custom_id": "1"}\n'.repeat(200_000);
const folder = mkdtempSync(join(tmpdir(), "files-"));
const path = join(folder, "batch.jsonl");
writeFileSync(path, data);

const life = { anchor: "created_at", seconds: 3600 };
const made = [
  await client.files.create({ file: createReadStream(path), purpose: "batch", expires_after: life }),
  await client.files.create({ file: await toFile(Buffer.from(data), "named.jsonl"), purpose: "batch" }),
];
rmSync(folder, { recursive: true });
assert.deepEqual(made.map((one) => one.filename), ["batch.jsonl", "named.jsonl"]);
assert.equal(made[0].expires_at, made[0].created_at + 3600);
for (const one of made) {
  assert.equal(one.bytes, data.length);
  assert.deepEqual(await client.files.retrieve(one.id), one);
  assert.equal(await (await client.files.content(one.id)).text(), data);
}
const listed = [];
for await (const one of client.files.list({ limit: 1, order: "asc" })) listed.push(one.id);
assert.deepEqual(listed, made.map((one) => one.id));
for (const one of made) assert.equal((await client.files.delete(one.id)).deleted, true);
await assert.rejects(client.files.retrieve(made[0].id), NotFoundError);
