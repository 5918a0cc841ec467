// What Ollama makes of a Modelfile and of conversations, by Go's own text/template and by Ollama's rules: ParseFile in
// https://github.com/ollama/ollama/blob/main/parser/parser.go, Execute and collate in template/template.go there.
//
//	echo '{"modelfile": "...", "conversations": [[{"role": "user", "content": "..."}]]}' | go run ollama.go
//
// writes {"commands": [["model", "..."], ...], "prompts": ["..."]}.
package main

import (
	"encoding/json"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var given struct {
		Modelfile     string
		Conversations [][]message
	}
	check(json.NewDecoder(os.Stdin).Decode(&given))
	commands, prompts := parse(given.Modelfile), []string{}
	for _, command := range commands {
		if command[0] == "template" {
			for _, conversation := range given.Conversations {
				prompts = append(prompts, fill(command[1], conversation))
			}
		}
	}
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{"commands": commands, "prompts": prompts}))
}

func fill(text string, conversation []message) string {
	parsed, err := template.New("").Option("missingkey=zero").Parse(text)
	check(err)
	var merged []*message
	var system []string
	for _, each := range conversation {
		if each.Role == "system" {
			system = append(system, each.Content)
		}
		if last := len(merged) - 1; last >= 0 && merged[last].Role == each.Role {
			merged[last].Content += "\n\n" + each.Content
		} else {
			merged = append(merged, &each)
		}
	}
	var prompt strings.Builder
	check(parsed.Execute(&prompt, map[string]any{"Messages": merged, "System": strings.Join(system, "\n\n")}))
	return prompt.String()
}

var known = []string{"from", "license", "template", "system", "adapter", "renderer", "parser", "parameter", "message"}

func parse(modelfile string) [][2]string {
	commands := [][2]string{}
	for rest := strings.TrimSpace(modelfile); rest != ""; rest = strings.TrimSpace(rest) {
		if rest[0] == '#' {
			_, rest = cut(rest, "\r\n")
			continue
		}
		var name, value string
		name, rest = cut(rest, " \t")
		if name = strings.ToLower(name); !slices.Contains(known, name) {
			log.Fatalf("%q is no command", name)
		}
		if name == "parameter" {
			name, rest = cut(rest, " \t")
		}
		value, rest = cutValue(rest)
		commands = append(commands, [2]string{name, value})
	}
	return commands
}

func cut(text, at string) (string, string) {
	if i := strings.IndexAny(text, at); i >= 0 {
		return text[:i], text[i+1:]
	}
	return text, ""
}

// A value ends with the first line that closes its quotes. Nothing in it is escaped, and what is not printable is lost.
func cutValue(text string) (string, string) {
	for end, r := range text + "\n" {
		if r == '\n' || r == '\r' {
			if value, closed := unquote(strings.TrimSpace(strings.Map(printable, text[:end]))); closed {
				return value, text[end:]
			}
		}
	}
	log.Fatalf("a value does not end: %s", text)
	return "", ""
}

func printable(r rune) rune {
	if strconv.IsPrint(r) || strings.ContainsRune("\t\r\n", r) {
		return r
	}
	return -1
}

func unquote(text string) (string, bool) {
	for _, quote := range []string{`"""`, `"`} {
		if inner, quoted := strings.CutPrefix(text, quote); quoted {
			return strings.CutSuffix(inner, quote)
		}
	}
	return text, true
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
